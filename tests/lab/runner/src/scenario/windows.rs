//! Scenario `windows`: halves with windows of different size use the smaller, and refuse in words what does not fit.

use super::steps::{self, ATTACH_CHECKS, Attached, SOCKET, Setup};
use super::{Scenario, When};
use crate::check::Checks;
use crate::guest::GuestSpec;
use crate::lab::{Lab, Pair};
use crate::ntb::Half;
use crate::sublet::{Daemon, Lending, ensure_no_lost_interrupt};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::time::Duration;

/// A small window on the lender, interrupt vectors in an unusual order after a reset.
pub const SCENARIO: Scenario = Scenario {
    name: "windows",
    checks: ATTACH_CHECKS + 7,
    when: When::Full,
    own_model: Some("it asks for windows of unequal size, and for the model's own list of maps"),
    deadline: Duration::from_secs(1200),
    run,
};

const MODEL: &[&str] = &["--bar2-bytes-a=268435456", "--intvec-reset=reverse"];
const USABLE: u64 = 256 << 20;
const GUEST_BYTES: u64 = 128 << 20;
const IO_BYTES: u64 = 64 << 10;
const SESSION_END_TIMEOUT: Duration = Duration::from_secs(20);

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let setup = Setup {
        model: MODEL,
        borrow: &["--ram", "128M"],
        ..Setup::default()
    };
    let attached = steps::attach(lab, checks, &setup, GuestSpec::stock("g", &lab.vmm()?))?;
    let Attached {
        guest,
        lending,
        fdid,
        before,
        idle,
        pair,
    } = attached;
    checks.check("both hosts tell the smaller window as usable", || {
        usable(&lending)
    });
    checks.check("all of the guest's memory lies in the usable part", || {
        inside(&pair)
    });
    checks.check("the guest writes and reads back", || {
        steps::write_and_read_back(&guest.agent, IO_BYTES)?;
        ensure_no_lost_interrupt(&guest.dmesg("polled|timeout")?)
    });
    checks.check("nothing of the lease is left", || {
        guest.shut_down()?;
        lending.b.verb(&["return", &fdid])?;
        pair.ensure_unchanged(&idle)
    });
    checks.check("a guest that does not fit is refused with a figure", || {
        refused(&lending.b, &fdid)
    });
    checks.check("one that fits is taken after that", || {
        lending.borrow(&fdid, SOCKET, &["--ram", "128M"])?;
        lending.b.verb(&["return", &fdid])?;
        lending
            .b
            .wait_status("end of the lease", SESSION_END_TIMEOUT, |status| {
                status["borrowed"].as_array().is_some_and(Vec::is_empty)
            })?;
        pair.ensure_unchanged(&idle)
    });
    checks.check("both hosts are as before", || {
        lending.end(&pair)?;
        pair.ensure_unchanged(&before)
    });
    Ok(())
}

fn usable(lending: &Lending) -> Result<String> {
    for daemon in [&lending.a, &lending.b] {
        let status = daemon.status()?;
        let window = &status["ports"][0]["window"];
        ensure!(window["usable"] == USABLE, "{window}");
    }
    Ok(format!("{USABLE} bytes"))
}

/// Every map of host B's half, as the model has it.
fn inside(pair: &Pair) -> Result<String> {
    let ntb = pair.ntb.as_ref().context("no NTB")?;
    let state = ntb.ask(&json!({ "op": "state" }))?;
    let base = state["b"]["windows"][0]["xbase"]
        .as_u64()
        .context("no base")?;
    let maps = ntb.maps(Half::B)?;
    let maps = maps["maps"].as_array().context("no maps")?;
    let mut bytes = 0;
    for map in maps {
        let number = |name: &str| map[name].as_u64().context("no number");
        let (iova, size) = (number("iova")?, number("size")?);
        ensure!(
            iova >= base && iova + size <= base + USABLE,
            "{map} is outside of the window at {base:#x}"
        );
        bytes += size;
    }
    // The BIOS area below 1 MiB is not all RAM.
    ensure!(bytes > GUEST_BYTES - (1 << 20), "{bytes} bytes are mapped");
    Ok(format!("{} maps, {bytes} bytes", maps.len()))
}

fn refused(daemon: &Daemon, fdid: &str) -> Result<String> {
    let words = ["borrow", fdid, "--socket", SOCKET, "--ram", "512M"];
    let said = daemon.refusal("window_full", &words)?;
    let wanted = (512u64 << 20).to_string();
    ensure!(
        said.contains(&wanted) && said.contains("would do"),
        "no figure in: {said}"
    );
    Ok(said)
}
