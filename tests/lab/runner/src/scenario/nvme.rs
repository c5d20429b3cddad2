//! Scenarios `nvme`, `nvme-mapped` and the same with workers as processes: a guest on host B uses a VF of host A with its stock driver.

use super::steps::{self, ATTACH_CHECKS, Attached, DETACH_CHECKS, Setup, dio};
use super::{Scenario, When};
use crate::check::Checks;
use crate::guest::GuestSpec;
use crate::host::VF_BDF;
use crate::lab::Lab;
use crate::sublet::{
    Workers, ensure_no_lost_interrupt, interrupt_count, trapped_accesses, vector_sum,
};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// BARs by way of the worker.
pub const TRAPPED: Scenario = Scenario {
    name: "nvme",
    checks: ATTACH_CHECKS + WORKS_CHECKS + DETACH_CHECKS,
    when: When::Gate,
    own_model: None,
    deadline: Duration::from_secs(1200),
    run: |lab, checks| run(lab, checks, &[], &["--bars", "trapped"], Trapped::All),
};

/// BARs mapped into the VMM.
pub const MAPPED: Scenario = Scenario {
    name: "nvme-mapped",
    checks: ATTACH_CHECKS + WORKS_CHECKS + DETACH_CHECKS,
    when: When::Gate,
    own_model: None,
    deadline: Duration::from_secs(1200),
    run: |lab, checks| run(lab, checks, &[], MAPPED_FLAGS, Trapped::None),
};

/// BARs by way of a worker that is a process in its sandbox.
pub const PROCESSES: Scenario = Scenario {
    name: "nvme-processes",
    checks: 14,
    when: When::Gate,
    own_model: None,
    deadline: Duration::from_secs(300),
    run: |lab, checks| {
        let flags = &["--bars", "trapped"];
        run_as(lab, checks, (&[], Workers::Processes), flags, Trapped::All)
    },
};

/// BARs mapped into the VMM, whose worker is a process in its sandbox.
pub const PROCESSES_MAPPED: Scenario = Scenario {
    name: "nvme-processes-mapped",
    checks: 14,
    when: When::Full,
    own_model: None,
    deadline: Duration::from_secs(300),
    run: |lab, checks| {
        let daemons = (&[][..], Workers::Processes);
        run_as(lab, checks, daemons, MAPPED_FLAGS, Trapped::None)
    },
};

/// The other chip of the family, with windows of unequal size and a link that comes late.
pub const OTHER_NTB: Scenario = Scenario {
    name: "nvme-0db4",
    checks: ATTACH_CHECKS + WORKS_CHECKS + DETACH_CHECKS,
    when: When::Full,
    own_model: Some("it asks for another chip, unequal windows and a late link"),
    deadline: Duration::from_secs(1200),
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
pub enum Trapped {
    /// Every access goes through the worker.
    All,
    /// None does.
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
    run_as(lab, checks, (model, Workers::Threads), borrow, trapped)
}

fn run_as(
    lab: &Lab,
    checks: &mut Checks,
    (model, workers): (&[&str], Workers),
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
            workers,
            ..Setup::default()
        },
        spec,
    )?;
    let since = Since::of_path(&attached)?;
    if workers == Workers::Processes {
        let what = match trapped {
            Trapped::All => "the worker is in its sandbox, with no door to the NTB",
            Trapped::None => {
                "the worker is in its sandbox, with no more of the NTB than its VMM gets"
            }
        };
        checks.check(what, || worker_holds_no_door(&attached, trapped));
        checks.check(
            "daemons and ports, started as root, are in their sandboxes",
            || {
                attached.lending.a.ensure_shut_in()?;
                attached.lending.b.ensure_shut_in()?;
                Ok("")
            },
        );
    }
    works(checks, &attached, &since, trapped)?;
    steps::detach(checks, attached)
}

/// How many checks [`works`] makes.
pub const WORKS_CHECKS: usize = 5;

/// Counters from which on [`works`] counts.
#[derive(Default)]
pub struct Since {
    raised: u64,
    bells: u64,
    signals: u64,
    trapped: u64,
}

impl Since {
    /// From the start of the path: nothing was raised before.
    pub fn of_path(attached: &Attached) -> Result<Self> {
        Ok(Since {
            trapped: trapped_accesses(&attached.lending.b.status()?)?,
            ..Since::default()
        })
    }

    /// From now on: the guest's driver has not been given the function yet, and the function has
    /// just been reset, so that the kernels' own counts begin anew.
    pub fn now(attached: &Attached) -> Result<Self> {
        let (lender, borrower) = (attached.lending.a.status()?, attached.lending.b.status()?);
        Ok(Since {
            raised: vector_sum(&lender, "lent", "raised")?,
            bells: vector_sum(&lender, "lent", "bells")?,
            signals: vector_sum(&borrower, "borrowed", "signals")?,
            trapped: trapped_accesses(&borrower)?,
        })
    }
}

/// The guest's stock driver has its namespace: its bytes, its interrupts, its way to the BARs.
pub fn works(
    checks: &mut Checks,
    attached: &Attached,
    since: &Since,
    trapped: Trapped,
) -> Result<()> {
    check_bytes(checks, attached)?;
    checks.check("no interrupt was lost", || {
        ensure_no_lost_interrupt(&attached.guest.dmesg("polled|timeout")?)
    });
    checks.check("interrupts of lender, worker and guest add up", || {
        interrupts_add_up(attached, since)
    });
    checks.check("BAR accesses go the way that was asked for", || {
        let count = trapped_accesses(&attached.lending.b.status()?)? - since.trapped;
        match trapped {
            Trapped::All => ensure!(count > 0, "no BAR access was trapped"),
            Trapped::None => ensure!(count == 0, "{count} BAR accesses were trapped"),
        }
        Ok(format!("{count} trapped since the guest is up"))
    });
    Ok(())
}

/// What the kernel of host B says of the worker: nothing of VFIO is open there, only its slice of
/// the window is mapped, and it has given its rights up. Where the VMM maps the window itself, the
/// worker has to hold what it hands over.
pub fn worker_holds_no_door(attached: &Attached, trapped: Trapped) -> Result<String> {
    let host = &attached.pair.b.agent;
    let status = attached.lending.b.status()?;
    let worker = &status["borrowed"][0]["worker"];
    ensure!(worker["landlock"] == true, "{worker}");
    ensure!(worker["seccomp"] == true, "{worker}");
    let pid = worker["pid"].as_u64().context("no worker")?;
    let maps = host.sh(&format!("cat /proc/{pid}/maps"))?;
    let own = host.sh(&format!("cat /proc/{pid}/status"))?;
    for line in ["CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        ensure!(own.contains(line), "{line} is not in {own}");
    }
    let mapped = matches!(trapped, Trapped::None);
    let doors = steps::ensure_worker_has_no_door(host, &attached.lending, mapped)?;
    ensure!(maps.contains("[vfio-device]"), "no slice is mapped: {maps}");
    let namespaces = worker["namespaces"].to_string();
    Ok(format!("{doors} devices open, namespaces {namespaces}"))
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
fn interrupts_add_up(attached: &Attached, since: &Since) -> Result<String> {
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
    let raised = vector_sum(&lender, "lent", "raised")? - since.raised;
    let bells = vector_sum(&lender, "lent", "bells")? - since.bells;
    let signals = vector_sum(&borrower, "borrowed", "signals")? - since.signals;
    let counts =
        format!("lender {kernel}, read {raised}, bells {bells}, signals {signals}, guest {seen}");
    ensure!(kernel == raised && raised > 0, "{counts}");
    ensure!(bells <= raised && seen <= signals && seen > 0, "{counts}");
    Ok(counts)
}
