//! Scenarios `nvme` and `nvme-mapped`: a guest on host B uses a VF of host A with its stock driver.

use super::steps::{self, Attached, Setup, dio};
use super::{Scenario, When};
use crate::check::Checks;
use crate::guest::GuestSpec;
use crate::host::VF_BDF;
use crate::lab::Lab;
use crate::sublet::{ensure_no_lost_interrupt, interrupt_count, trapped_accesses, vector_sum};
use anyhow::{Result, ensure};
use std::time::Duration;

/// BARs by way of the worker.
pub const TRAPPED: Scenario = Scenario {
    name: "nvme",
    checks: 12,
    when: When::Gate,
    own_model: None,
    deadline: Duration::from_secs(300),
    run: |lab, checks| run(lab, checks, &[], &["--bars", "trapped"], Trapped::All),
};

/// BARs mapped into the VMM.
pub const MAPPED: Scenario = Scenario {
    name: "nvme-mapped",
    checks: 12,
    when: When::Gate,
    own_model: None,
    deadline: Duration::from_secs(300),
    run: |lab, checks| run(lab, checks, &[], MAPPED_FLAGS, Trapped::None),
};

/// The other chip of the family, with windows of unequal size and a link that comes late.
pub const OTHER_NTB: Scenario = Scenario {
    name: "nvme-0db4",
    checks: 12,
    when: When::Full,
    own_model: Some("it asks for another chip, unequal windows and a late link"),
    deadline: Duration::from_secs(300),
    run: |lab, checks| run(lab, checks, OTHER_MODEL, MAPPED_FLAGS, Trapped::None),
};

const MAPPED_FLAGS: &[&str] = &["--bars", "mapped", "--trust-vmm"];
const OTHER_MODEL: &[&str] = &[
    "--device-id=0db4",
    "--intvec-reset=zero",
    "--late-link-up=3000",
    "--bar2-bytes-a=536870912",
];

/// What the worker's count of trapped BAR accesses must show once the guest is attached.
#[derive(Clone, Copy)]
enum Trapped {
    All,
    None,
}

const BYTES: u64 = 1 << 20;

fn run(
    lab: &Lab,
    checks: &mut Checks,
    model: &[&str],
    borrow: &[&str],
    trapped: Trapped,
) -> Result<()> {
    let spec = GuestSpec::stock("g", &lab.vmm()?);
    let attached = steps::attach(
        lab,
        checks,
        &Setup {
            model,
            borrow,
            more_vfs: 0,
        },
        spec,
    )?;
    let trapped_before = trapped_accesses(&attached.lending.b.status()?)?;
    check_bytes(checks, &attached)?;
    let Attached { guest, lending, .. } = &attached;
    checks.check("no interrupt was lost", || {
        ensure_no_lost_interrupt(&guest.dmesg("polled|timeout")?)
    });
    checks.check("interrupts of lender, worker and guest add up", || {
        interrupts_add_up(&attached)
    });
    checks.check("BAR accesses go the way that was asked for", || {
        let count = trapped_accesses(&lending.b.status()?)? - trapped_before;
        match trapped {
            Trapped::All => ensure!(count > 0, "no BAR access was trapped"),
            Trapped::None => ensure!(count == 0, "{count} BAR accesses were trapped"),
        }
        Ok(format!("{count} trapped since the guest is up"))
    });
    steps::detach(checks, attached)
}

/// What the guest wrote comes back to it, and lies in the lender's own blocks.
fn check_bytes(checks: &mut Checks, attached: &Attached) -> Result<()> {
    let written = checks.must("the guest writes 1 MiB and reads it back", || {
        steps::write_and_read_back(&attached.guest.agent, BYTES)
    })?;
    checks.check("host a's own function reads the same bytes", || {
        let read = dio(&attached.pair.a.agent, "read", BYTES, None)?;
        ensure!(
            written == read,
            "the guest wrote {written}, host a has {read}"
        );
        Ok(read)
    });
    Ok(())
}

/// What host A's kernel counted is what the port read from its eventfds; bells are merged from
/// those, signals from bells, and a guest may merge signals.
fn interrupts_add_up(attached: &Attached) -> Result<String> {
    let Attached {
        pair,
        lending,
        guest,
        ..
    } = attached;
    let bdf = "basename $(readlink -f /sys/class/nvme/nvme0/device)";
    let seen = interrupt_count(&guest.agent, &guest.agent.sh(bdf)?)?;
    let (lender, borrower) = (lending.a.status()?, lending.b.status()?);
    let kernel = interrupt_count(&pair.a.agent, VF_BDF)?;
    let raised = vector_sum(&lender, "lent", "raised")?;
    let bells = vector_sum(&lender, "lent", "bells")?;
    let signals = vector_sum(&borrower, "borrowed", "signals")?;
    let counts =
        format!("lender {kernel}, read {raised}, bells {bells}, signals {signals}, guest {seen}");
    ensure!(kernel == raised && raised > 0, "{counts}");
    ensure!(bells <= raised && seen <= signals && seen > 0, "{counts}");
    Ok(counts)
}
