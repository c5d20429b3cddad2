//! Scenario `refusals`: what cannot be done is refused in words, and nothing is left behind.

use super::steps::SOCKET;
use super::{Scenario, When};
use crate::check::Checks;
use crate::guest::{Guest, GuestSpec, Memory, Vmm};
use crate::host::{NTB_BDF, PF_BDF};
use crate::lab::{Lab, Pair};
use crate::pci;
use crate::sublet::{Daemon, Lending};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// Verbs of an operator who is wrong, and a VMM whose guest's memory is its own.
pub const SCENARIO: Scenario = Scenario {
    name: "refusals",
    checks: 13,
    when: When::Full,
    own_model: None,
    deadline: Duration::from_secs(1200),
    run,
};

/// Of a host whose file says so.
const BAD_CONFIG: &str = "[node]\nid = 4\nnmae = \"a\"\n";
const SESSION_TIMEOUT: Duration = Duration::from_secs(40);

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let ntb = lab.ntb(&[])?;
    let mut started = None;
    checks.must(
        "both hosts boot and their daemons agree on a session",
        || {
            let pair = lab.boot_pair(Some(ntb))?;
            pci::wait_namespace(&pair.a.agent)?;
            let before = pair.snapshot()?;
            let lending = Lending::start(lab, &pair, 2, 1)?;
            lending.wait_link()?;
            started = Some((pair, before, lending));
            Ok("")
        },
    )?;
    let (pair, before, lending) = started.context("no hosts")?;
    refuse_lender(checks, &lending.a);
    checks.check("an unknown key of the file is told with its place", || {
        bad_config(lab, &pair)
    });
    let fdid = lending.offer()?;
    let idle = pair.snapshot()?;
    refuse_borrower(checks, &lending.b, &fdid);
    checks.check("what is lent already is taken", || {
        lending.borrow(&fdid, SOCKET, &[])?;
        lending.b.refusal(
            "taken",
            &["borrow", &fdid, "--socket", "/run/sublet/second.sock"],
        )
    });
    checks.check("a VMM with private guest memory is told so", || {
        private_memory(lab, &pair)
    });
    checks.check("nothing is left behind", || {
        lending.b.verb(&["return", &fdid])?;
        pair.ensure_unchanged(&idle)
    });
    checks.check("both hosts are as before", || {
        lending.end(&pair)?;
        pair.ensure_unchanged(&before)
    });
    Ok(())
}

fn refuse_lender(checks: &mut Checks, daemon: &Daemon) {
    for (what, code, bdf) in [
        (
            "a physical function with VFs is not lent",
            "sriov_on",
            PF_BDF,
        ),
        ("a port is not lent", "not_allowed", NTB_BDF),
        (
            "what policy does not name is not lent",
            "not_allowed",
            "0000:00:1f.2",
        ),
        (
            "a function that is not there is not lent",
            "unknown_function",
            "0000:01:1f.7",
        ),
    ] {
        checks.check(what, || {
            let added = daemon.try_verb(&["add", bdf], Duration::from_secs(20))?;
            if added.code != Some(0) {
                return daemon.refusal(code, &["add", bdf]);
            }
            let refused = daemon.refusal(code, &["available", bdf]);
            daemon.verb(&["remove", bdf])?;
            refused
        });
    }
}

fn refuse_borrower(checks: &mut Checks, daemon: &Daemon, fdid: &str) {
    for (what, code, words) in [
        (
            "an unknown function is not borrowed",
            "unknown_function",
            vec!["40177"],
        ),
        (
            "more memory than the window holds is refused",
            "window_full",
            vec![fdid, "--ram", "8G"],
        ),
        (
            "mapped BARs without trust are refused",
            "trust",
            vec![fdid, "--bars", "mapped"],
        ),
    ] {
        checks.check(what, || {
            let mut argv = vec!["borrow", "--socket", SOCKET];
            argv.extend(&words);
            daemon.refusal(code, &argv)
        });
    }
}

fn bad_config(lab: &Lab, pair: &Pair) -> Result<String> {
    std::fs::write(lab.dir.join("bad.toml"), BAD_CONFIG)?;
    let (program, config) = (pair.a.shared("bin/sublet"), pair.a.shared("bad.toml"));
    let argv = [&program, "daemon", "--in-process", "--config", &config];
    let output = pair.a.agent.try_run(&argv, &[], Duration::from_secs(20))?;
    let said = format!("{}{}", output.stdout, output.stderr);
    ensure!(
        output.code == Some(6),
        "exit code {:?}: {said}",
        output.code
    );
    ensure!(
        said.contains("nmae") && said.contains("name"),
        "it said: {said}"
    );
    ensure!(
        said.contains(":3:1") || said.contains("line 3"),
        "it said: {said}"
    );
    Ok(said)
}

/// QEMU still sends its memfd; a device would write pages that the guest never sees.
fn private_memory(lab: &Lab, pair: &Pair) -> Result<String> {
    let mut spec = GuestSpec::stock("p", &Vmm::Qemu).device(SOCKET);
    spec.memory = Memory::Private;
    let guest = Guest::start(&spec, &pair.b, &lab.cache)?;
    let log = pair.b.shared("daemon-b.log");
    let told = format!("grep 'does not map bytes' {log}");
    let line = pair.b.agent.wait_until(&told, SESSION_TIMEOUT);
    guest.kill()?;
    line
}
