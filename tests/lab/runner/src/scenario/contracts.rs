//! Scenario `contracts`: what the soft fabric keeps to, real VFIO keeps to as well: ports and address spaces.

use super::{Scenario, When};
use crate::check::Checks;
use crate::host::{Host, HostSpec, NTB_BDF, VF_BDF, vfio_user_device};
use crate::lab::Lab;
use crate::pci;
use crate::snapshot::Snapshot;
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// One host has both halves of the NTB, so that one program can drive either end.
pub const SCENARIO: Scenario = Scenario {
    name: "contracts",
    checks: 27,
    when: When::Gate,
    own_model: None,
    deadline: Duration::from_secs(1200),
    run,
};

/// The NTB's other half, behind a root port of its own.
const OTHER_BDF: &str = "0000:03:00.0";
const PROGRAM: &str = "lab-contracts";
/// A thousand rounds of a store and a bell through two emulated halves take seconds.
const CHECK_TIMEOUT: Duration = Duration::from_secs(60);

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let ntb = lab.ntb(&[])?;
    let mut booted = None;
    checks.must("a host boots with both halves of the NTB", || {
        let mut spec = HostSpec::stock("a", &lab.cache)?
            .lender()
            .ntb(&ntb.socket_a);
        spec.arguments = vec![
            "-device".into(),
            "pcie-root-port,id=rp2,slot=3,addr=7".into(),
            "-device".into(),
            vfio_user_device(&ntb.socket_b.display().to_string(), Some("rp2")),
        ];
        let mut host = Host::start(&spec, &lab.cache, &lab.dir, lab.since)?;
        host.wait_ready()?;
        let before = Snapshot::take(&host.agent)?;
        pci::make_vfs(&host.agent, 1)?;
        for bdf in [NTB_BDF, OTHER_BDF, VF_BDF] {
            pci::bind(&host.agent, bdf, "vfio-pci")?;
        }
        booted = Some((host, before));
        Ok("")
    })?;
    let (host, before) = booted.context("no host")?;
    let program = lab.share_binary(PROGRAM)?;
    for name in names(&host, &program, "port")? {
        checks.check(&format!("NTB: {name}"), || {
            keeps(&host, &[&program, "port", &name, NTB_BDF, OTHER_BDF])
        });
    }
    for (what, bdf) in [("NTB", NTB_BDF), ("VF", VF_BDF)] {
        for name in names(&host, &program, "space")? {
            checks.check(&format!("container of the {what}: {name}"), || {
                keeps(&host, &[&program, "space", &name, bdf])
            });
        }
    }
    checks.check("the host is as before", || {
        for bdf in [VF_BDF, OTHER_BDF, NTB_BDF] {
            pci::unbind(&host.agent, bdf)?;
        }
        pci::remove_vfs(&host.agent)?;
        before.ensure_equal(&Snapshot::take(&host.agent)?)?;
        Ok("")
    });
    Ok(())
}

fn names(host: &Host, program: &str, contract: &str) -> Result<Vec<String>> {
    let text = host.agent.run(&[program, "list", contract])?;
    let names: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
    ensure!(!names.is_empty(), "the contract of a {contract} is empty");
    Ok(names)
}

fn keeps(host: &Host, argv: &[&str]) -> Result<&'static str> {
    host.agent.run_within(argv, CHECK_TIMEOUT)?;
    Ok("")
}
