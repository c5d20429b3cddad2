//! Scenario `hosts`: both hosts boot, have what the other scenarios need, and carry a guest.

use super::{Scenario, When};
use crate::check::Checks;
use crate::guest::GuestSpec;
use crate::host::{NTB_BDF, VF_BDF};
use crate::lab::Lab;
use crate::log::{self, NESTED_FAULTS};
use crate::pci;
use anyhow::{Result, ensure};
use std::time::Duration;

/// A new scenario starts as a copy of this file.
pub const SCENARIO: Scenario = Scenario {
    name: "hosts",
    checks: 10,
    when: When::Gate,
    own_model: None,
    deadline: Duration::from_secs(1200),
    run,
};

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let ntb = lab.ntb(&[])?;
    let mut pair = None;
    checks.must("both hosts boot and their agents answer", || {
        let booted = lab.boot_pair(Some(ntb))?;
        let release = booted.a.agent.run(&["uname", "-r"])?;
        pair = Some(booted);
        Ok(release)
    })?;
    let Some(pair) = pair else { return Ok(()) };
    let (a, b) = (&pair.a.agent, &pair.b.agent);
    checks.check("host b has nested KVM", || {
        b.run(&["test", "-c", "/dev/kvm"])
    });
    for host in [&pair.a, &pair.b] {
        checks.check(
            &format!("host {} sees the NTB in a group of its own", host.name),
            || {
                let dir = format!("/sys/bus/pci/devices/{NTB_BDF}");
                let id = host.agent.sh(&format!(
                    "cat {dir}/vendor {dir}/device; ls {dir}/iommu_group/devices"
                ))?;
                ensure!(id == format!("0x8086\n0x347e\n{NTB_BDF}"), "found {id}");
                Ok("8086:347e")
            },
        );
    }
    pci::wait_namespace(a)?;
    let before = pair.snapshot()?;
    checks.check("host a makes a VF without a driver", || {
        pci::make_vfs(a, 1)?;
        a.sh(&format!(
            "test -e /sys/bus/pci/devices/{VF_BDF}; ! test -e /sys/bus/pci/devices/{VF_BDF}/driver"
        ))
    });
    checks.check("the VF comes online and binds to vfio-pci", || {
        pci::nvme_online(a, 1, 2, 1)?;
        pci::bind(a, VF_BDF, "vfio-pci")?;
        a.sh("ls /dev/vfio")
    });
    checks.check("the VF is given back", || {
        pci::unbind(a, VF_BDF)?;
        pci::nvme_offline(a, 1)?;
        pci::remove_vfs(a)?;
        Ok("")
    });
    let mut ended = None;
    checks.must("a guest boots on host b and ends", || {
        let mut spec = GuestSpec::stock("g", &lab.vmm()?);
        spec.cmdline = "reboot=t".to_owned();
        let guest = lab.boot_guest(&spec, &pair.b)?;
        let release = guest.agent.run(&["uname", "-r"])?;
        ended = Some(guest.shut_down_by_fault()?);
        Ok(release)
    })?;
    checks.check(
        "that it ended by a triple fault is told, and not excused",
        || {
            let end = ended.unwrap_or_default();
            ensure!(end.contains("triple fault"), "told: {end}");
            let excused = log::first_of(&pair.b.dir, &NESTED_FAULTS);
            ensure!(excused.is_none(), "excused by {excused:?}");
            Ok(end)
        },
    );
    checks.check("both hosts are as before", || {
        pair.ensure_unchanged(&before)
    });
    Ok(())
}
