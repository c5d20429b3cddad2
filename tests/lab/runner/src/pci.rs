//! Steps on a host's PCI functions that several scenarios take: make VFs, bind, bring online.

use crate::agent::Agent;
use crate::host::PF_BDF;
use anyhow::Result;
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
