//! Steps on a host's PCI functions that several scenarios take: make VFs, bind, bring online.

use crate::agent::Agent;
use crate::host::PF_BDF;
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::time::Duration;

const APPEAR_TIMEOUT: Duration = Duration::from_secs(20);

/// Makes VFs of the lender's NVMe without any driver for them.
pub fn make_vfs(agent: &Agent, count: u32) -> Result<()> {
    let dir = format!("/sys/bus/pci/devices/{PF_BDF}");
    // The driver takes a while after its module is loaded; without it there are no VFs.
    agent.wait_until("test -c /dev/nvme0", APPEAR_TIMEOUT)?;
    agent.sh(&format!(
        "echo 0 > {dir}/sriov_drivers_autoprobe; echo {count} > {dir}/sriov_numvfs"
    ))?;
    Ok(())
}

/// Removes them, and leaves autoprobe as the kernel has it.
pub fn remove_vfs(agent: &Agent) -> Result<()> {
    let dir = format!("/sys/bus/pci/devices/{PF_BDF}");
    agent.sh(&format!(
        "echo 0 > {dir}/sriov_numvfs; echo 1 > {dir}/sriov_drivers_autoprobe"
    ))?;
    Ok(())
}

/// Binds a function to a driver by its override; the driver that had it lets go first.
pub fn bind(agent: &Agent, bdf: &str, driver: &str) -> Result<()> {
    let dir = format!("/sys/bus/pci/devices/{bdf}");
    agent.sh(&format!(
        "if [ -e {dir}/driver ]; then echo {bdf} > {dir}/driver/unbind; fi\n\
         echo {driver} > {dir}/driver_override\n\
         echo {bdf} > /sys/bus/pci/drivers_probe\n\
         test \"$(basename $(readlink {dir}/driver))\" = {driver}"
    ))?;
    Ok(())
}

/// Unbinds it and takes the override away.
pub fn unbind(agent: &Agent, bdf: &str) -> Result<()> {
    let dir = format!("/sys/bus/pci/devices/{bdf}");
    agent.sh(&format!(
        "echo {bdf} > {dir}/driver/unbind; echo > {dir}/driver_override"
    ))?;
    Ok(())
}

/// Waits until somebody else has unbound it.
pub fn wait_unbound(agent: &Agent, bdf: &str) -> Result<()> {
    let gone = format!("! test -e /sys/bus/pci/devices/{bdf}/driver");
    agent
        .wait_until(&gone, APPEAR_TIMEOUT)
        .map(drop)
        .with_context(|| format!("{bdf} keeps its driver"))
}

/// Gives an NVMe VF queues and interrupts through its PF and brings it online. With one interrupt
/// all queues share a vector; three and three give the guest more than one.
pub fn nvme_online(agent: &Agent, controller: u32, queues: u32, interrupts: u32) -> Result<()> {
    // NVMe Base Specification, virtualization management: 8 assigns to a secondary controller
    // (resource 0 queues, 1 interrupts), 9 brings it online.
    for (action, resource, count) in [(8, 0, queues), (8, 1, interrupts), (9, 0, 0)] {
        let words = [action, resource, controller, count].map(|number| number.to_string());
        let [action, resource, controller, count] = words.each_ref().map(String::as_str);
        agent.run(&[
            "lab-agent",
            "nvme-virt-mgmt",
            "/dev/nvme0",
            action,
            resource,
            controller,
            count,
        ])?;
    }
    Ok(())
}

/// Takes it offline (7), which frees its queues and interrupts.
pub fn nvme_offline(agent: &Agent, controller: u32) -> Result<()> {
    let controller = controller.to_string();
    agent.run(&[
        "lab-agent",
        "nvme-virt-mgmt",
        "/dev/nvme0",
        "7",
        "0",
        &controller,
        "0",
    ])?;
    Ok(())
}

/// Waits until the lender's own driver has found its namespace, some time after its module is loaded.
pub fn wait_namespace(agent: &Agent) -> Result<()> {
    agent
        .wait_until("test -b /dev/nvme0n1", APPEAR_TIMEOUT)
        .map(drop)
}

/// The physical address of a BAR, as the kernel assigned it.
pub fn bar_address(agent: &Agent, bdf: &str, bar: usize) -> Result<u64> {
    let text = agent.text(&format!("/sys/bus/pci/devices/{bdf}/resource"))?;
    let start = text
        .lines()
        .nth(bar)
        .and_then(|line| line.split(' ').next());
    let start = start.and_then(|hex| u64::from_str_radix(hex.trim_start_matches("0x"), 16).ok());
    start.with_context(|| format!("no BAR {bar} of {bdf} in: {text}"))
}

/// Properties of an NVMe controller (NVMe Base Specification 2.0, 3.1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct NvmeRegisters {
    /// Version: never zero, so that a function that does not answer is not taken for one reset.
    pub vs: u32,
    /// Interrupt mask.
    pub intms: u32,
    /// Controller configuration.
    pub cc: u32,
    /// Controller status.
    pub csts: u32,
    /// Admin queue attributes.
    pub aqa: u32,
    /// Admin submission queue address.
    pub asq: u64,
    /// Admin completion queue address.
    pub acq: u64,
}

impl NvmeRegisters {
    /// Fails unless the controller is as after a function level reset.
    pub fn ensure_reset(&self) -> Result<()> {
        ensure!(
            self.vs != 0 && self.vs != u32::MAX,
            "the function does not answer: {self:x?}"
        );
        let running = (self.intms, self.cc, self.csts) == (0, 0, 0);
        ensure!(running && self.queues_are_gone(), "left behind: {self:x?}");
        Ok(())
    }

    /// Whether nothing tells where a tenant's admin queues were.
    pub fn queues_are_gone(&self) -> bool {
        (self.aqa, self.asq, self.acq) == (0, 0, 0)
    }
}

/// Reads them through /dev/mem, past whichever driver has the function.
pub fn nvme_registers(agent: &Agent, bdf: &str) -> Result<NvmeRegisters> {
    let base = bar_address(agent, bdf, 0)?.to_string();
    let text = agent.run(&["lab-agent", "devmem", "read", &base, "0x38"])?;
    let words = text.lines().map(|hex| u32::from_str_radix(hex, 16));
    let words: Vec<u32> = words.collect::<Result<_, _>>().context("no hex words")?;
    let word = |offset: usize| words.get(offset / 4).copied().context("too few words");
    let long = |offset: usize| {
        Ok::<_, anyhow::Error>(u64::from(word(offset)?) | u64::from(word(offset + 4)?) << 32)
    };
    Ok(NvmeRegisters {
        vs: word(0x08)?,
        intms: word(0x0c)?,
        cc: word(0x14)?,
        csts: word(0x1c)?,
        aqa: word(0x24)?,
        asq: long(0x28)?,
        acq: long(0x30)?,
    })
}

/// What is left of a pattern in the admin queues' registers of a function that nobody has, after
/// the kernel's own reset of it: what this controller's function level reset does by itself.
pub fn after_own_reset(agent: &Agent, bdf: &str) -> Result<NvmeRegisters> {
    let base = bar_address(agent, bdf, 0)?;
    // A function without a driver sleeps and decodes no addresses: it would not answer.
    let dir = format!("/sys/bus/pci/devices/{bdf}");
    agent.sh(&format!(
        "echo on > {dir}/power/control; echo 1 > {dir}/enable"
    ))?;
    for (offset, value) in [
        (0x0c, 0x5a5a_a5a5),
        (0x24, 0x001f_001f),
        (0x28, 0x5a5a_a000_u32),
        (0x30, 0xa5a5_5000),
    ] {
        let (at, value) = ((base + offset).to_string(), value.to_string());
        agent.run(&["lab-agent", "devmem", "write", &at, &value])?;
    }
    let before = nvme_registers(agent, bdf)?;
    ensure!(
        before.intms != 0 && before.aqa != 0 && before.asq != 0 && before.acq != 0,
        "the pattern is not there: {before:x?}"
    );
    agent.sh(&format!("echo 1 > {dir}/reset"))?;
    let after = nvme_registers(agent, bdf)?;
    agent.sh(&format!(
        "echo 0 > {dir}/enable; echo auto > {dir}/power/control"
    ))?;
    ensure!(
        after.intms == 0 && after.vs == before.vs,
        "the function was not reset: {after:x?}"
    );
    Ok(after)
}

/// The first NVMe function of a machine, whether or not a driver has it.
pub fn find_nvme(agent: &Agent) -> Result<String> {
    let found =
        agent.sh("cd /sys/bus/pci/devices; dirname $(grep -l 0x010802 */class | head -n 1)")?;
    Ok(found)
}

/// All of them, in the order of their addresses.
pub fn find_nvmes(agent: &Agent) -> Result<Vec<String>> {
    let found = agent
        .sh("cd /sys/bus/pci/devices; for c in $(grep -l 0x010802 */class); do dirname $c; done")?;
    Ok(found.lines().map(str::to_owned).collect())
}

/// The block device of an NVMe function's namespace, where a machine does not join several paths to
/// it; waits until its driver has found it.
pub fn wait_block_device(agent: &Agent, bdf: &str) -> Result<String> {
    let found = format!("/sys/bus/pci/devices/{bdf}/nvme/nvme*/nvme*n1");
    agent.wait_until(&format!("ls -d {found}"), APPEAR_TIMEOUT)?;
    let name = agent.sh(&format!("basename {found}"))?;
    let device = format!("/dev/{}", name.trim());
    agent.wait_until(&format!("test -b {device}"), APPEAR_TIMEOUT)?;
    Ok(device)
}
