//! Scenarios `nvme` and `nvme-mapped`: a guest on host B uses a VF of host A with its stock driver.

use super::Scenario;
use crate::check::Checks;
use crate::guest::{Guest, GuestSpec};
use crate::host::VF_BDF;
use crate::lab::{Lab, Pair};
use crate::pci;
use crate::sublet::{
    Lending, dio, ensure_no_lost_interrupt, interrupt_count, trapped_accesses, vector_sum,
};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// BARs by way of the worker.
pub const TRAPPED: Scenario = Scenario {
    name: "nvme",
    checks: 12,
    gate: false,
    deadline: Duration::from_secs(300),
    run: |lab, checks| run(lab, checks, &[], Trapped::All),
};

/// BARs mapped into the VMM.
pub const MAPPED: Scenario = Scenario {
    name: "nvme-mapped",
    checks: 12,
    gate: false,
    deadline: Duration::from_secs(300),
    run: |lab, checks| {
        run(
            lab,
            checks,
            &["--bars", "mapped", "--trust-vmm"],
            Trapped::None,
        )
    },
};

/// What the worker's count of trapped BAR accesses must show once the guest is attached.
#[derive(Clone, Copy)]
enum Trapped {
    All,
    None,
}

/// Where a worker's socket lies on host B.
const SOCKET: &str = "/run/sublet/vf.sock";
/// The guest writes here and the lender reads the same blocks.
const OFFSET: &str = "1048576";
const BYTES: &str = "1048576";
const SEED: &str = "20";
/// A trapped window takes 512 accesses for a page: 1 MiB is written in 6 to 8 s on an idle machine.
const WRITE_TIMEOUT: Duration = Duration::from_secs(90);
const APPEAR_TIMEOUT: Duration = Duration::from_secs(60);

fn run(lab: &Lab, checks: &mut Checks, borrow_flags: &[&str], trapped: Trapped) -> Result<()> {
    let ntb = lab.ntb(&[])?;
    let mut pair = None;
    checks.must("both hosts boot", || {
        pair = Some(lab.boot_pair(Some(ntb))?);
        Ok("")
    })?;
    let pair = pair.context("no hosts")?;
    pci::wait_namespace(&pair.a.agent)?;
    let before = pair.snapshot()?;
    let mut lending = None;
    checks.must("both daemons agree on a session", || {
        let started = Lending::start(lab, &pair, 2, 1)?;
        let session = started.wait_link()?;
        lending = Some(started);
        Ok(session)
    })?;
    let lending = lending.context("no daemons")?;
    let fdid = checks.must("host a offers the VF and host b sees it", || {
        lending.offer()
    })?;
    let idle = pair.snapshot()?;
    checks.must("host b borrows it", || {
        lending.borrow(&fdid, SOCKET, borrow_flags)
    })?;
    let mut guest = None;
    checks.must("a guest with the stock driver finds its namespace", || {
        let spec = GuestSpec::stock("g", &lab.vmm()?).device(SOCKET);
        let booted = lab.boot_guest(&spec, &pair.b)?;
        booted
            .agent
            .wait_until("test -b /dev/nvme0n1", APPEAR_TIMEOUT)?;
        guest = Some(booted);
        Ok("")
    })?;
    let guest = guest.context("no guest")?;
    let attached = lending.b.status()?;
    check_bytes(checks, &pair, &guest)?;
    checks.check("no interrupt was lost", || {
        ensure_no_lost_interrupt(&guest.dmesg()?)
    });
    checks.check("interrupts of lender, worker and guest add up", || {
        interrupts_add_up(&pair, &lending, &guest)
    });
    checks.check("BAR accesses go the way that was asked for", || {
        let count = trapped_accesses(&lending.b.status()?)? - trapped_accesses(&attached)?;
        match trapped {
            Trapped::All => ensure!(count > 0, "no BAR access was trapped"),
            Trapped::None => ensure!(count == 0, "{count} BAR accesses were trapped"),
        }
        Ok(format!("{count} trapped since the guest is up"))
    });
    checks.check(
        "the function is returned and nothing of the lease is left",
        || {
            guest.shut_down()?;
            lending.b.verb(&["return", &fdid])?;
            pair.ensure_unchanged(&idle)
        },
    );
    checks.check("both hosts are as before", || {
        lending.end(&pair)?;
        pair.ensure_unchanged(&before)
    });
    Ok(())
}

/// What the guest wrote comes back to it, and lies in the lender's own blocks.
fn check_bytes(checks: &mut Checks, pair: &Pair, guest: &Guest) -> Result<()> {
    let written = checks.must("the guest writes 1 MiB and reads it back", || {
        let written = dio(
            &guest.agent,
            &["write", "/dev/nvme0n1", OFFSET, BYTES, SEED],
            WRITE_TIMEOUT,
        )?;
        let read = dio(
            &guest.agent,
            &["read", "/dev/nvme0n1", OFFSET, BYTES],
            WRITE_TIMEOUT,
        )?;
        ensure!(written == read, "wrote {written}, read {read}");
        Ok(written)
    })?;
    checks.check("host a's own function reads the same bytes", || {
        let read = dio(
            &pair.a.agent,
            &["read", "/dev/nvme0n1", OFFSET, BYTES],
            WRITE_TIMEOUT,
        )?;
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
fn interrupts_add_up(pair: &Pair, lending: &Lending, guest: &Guest) -> Result<String> {
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
