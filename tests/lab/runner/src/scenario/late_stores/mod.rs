//! Scenarios `late-stores` and `mapped-door`: what stood still while its lease was revoked reaches nothing of the next tenant, and a VMM that holds the window is ended first.

mod elsewhere;
mod freed;

use super::client::{Client, EARLY_BYSTANDER};
use super::steps::{self, ATTACH_CHECKS, Attached, DETACH_CHECKS, SOCKET, Setup, dio};
use super::third::{self, Third};
use super::{Scenario, When};
use crate::agent::{Agent, SIGCONT, SIGSTOP};
use crate::check::Checks;
use crate::guest::{Guest, GuestSpec};
use crate::host::{Host, VF_BDF};
use crate::lab::Lab;
use crate::pci::{self, NvmeRegisters};
use crate::sublet::{PORT, Workers};
use anyhow::{Context, Result, bail, ensure};
use freed::Freed;
use serde_json::Value;
use std::fs;
use std::time::Duration;

/// One tenant after the other on the same function; each stores without end until it is gone.
pub const SCENARIO: Scenario = Scenario {
    name: "late-stores",
    checks: ATTACH_CHECKS + 1 + VICTIMS.len() + DETACH_CHECKS,
    when: When::Full,
    own_model: None,
    deadline: Duration::from_secs(1200),
    run,
};

/// The same where the VMM itself has the window: nothing but its end takes that from it.
pub const MAPPED: Scenario = Scenario {
    name: "mapped-door",
    checks: ATTACH_CHECKS + 3,
    when: When::Full,
    own_model: None,
    deadline: Duration::from_secs(1200),
    run: run_mapped,
};

/// Who stands still between a guest's store and the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Vmm,
    Worker,
    BorrowerPort,
    LenderPort,
}

const VICTIMS: [Victim; 4] = [
    Victim::Vmm,
    Victim::Worker,
    Victim::BorrowerPort,
    Victim::LenderPort,
];

const WAIT: Duration = Duration::from_secs(60);
const BYTES: u64 = 64 << 10;
const SOCKETS: [&str; 2] = [SOCKET, "/run/sublet/next.sock"];
/// NVMe's AQA, which a controller takes at any time and no driver sets to this.
const AQA: u64 = 0x24;
const PATTERN: u32 = 0x05a5_05a5;
/// How many stores are waited for where the storing guest lives.
const LATE: u64 = 5;
const STORE_LOG: &str = "/tmp/stores";
/// The function's DMA into its guest's memory, without end.
const READS: &str = "while lab-agent dio read /dev/nvme0n1 1048576 65536; do :; done";
const READ_LOG: &str = "/tmp/reads";
const IO_LOG: &str = "/tmp/io";
const REVOKE_LOG: &str = "/run/revoke.log";
const HOLDERS: &str = "/run/sublet/ports/ntb0/holders";

/// The function, and who has it.
struct Rig<'a> {
    lab: &'a Lab,
    attached: Attached,
    /// Flags of `sublet borrow`.
    borrow: &'a [&'a str],
    tenants: usize,
    /// On each host one.
    bystanders: Vec<Client>,
    /// How often they were looked at.
    looks: u64,
    /// Where the function is lent on to while its borrower's port stands still.
    third: Option<Third>,
}

/// The tenant that comes next, and memory of its guest that the function is never told of, filled
/// before the guest has a driver.
struct Next {
    guest: Guest,
    memory: Client,
}

impl<'a> Rig<'a> {
    fn new(lab: &'a Lab, attached: Attached, borrow: &'a [&'a str]) -> Result<Self> {
        let bystander = |host: &Host| Client::bystander(&host.agent);
        let bystanders = vec![bystander(&attached.pair.a)?, bystander(&attached.pair.b)?];
        Ok(Rig {
            lab,
            attached,
            borrow,
            tenants: 0,
            bystanders,
            looks: 0,
            third: None,
        })
    }

    /// Nobody is left but the last tenant.
    fn end(self) -> Result<Attached> {
        for bystander in self.bystanders {
            bystander.end()?;
        }
        Ok(self.attached)
    }
}

/// Of a borrower's status: its only lease is over, and it knows.
fn is_lost(status: &Value) -> bool {
    status["borrowed"][0]["state"] == "lost"
}

fn spec(lab: &Lab, name: &str) -> Result<GuestSpec> {
    let mut spec = GuestSpec::stock(name, &lab.vmm()?);
    // The guest stores past its driver.
    spec.cmdline = "iomem=relaxed".to_owned();
    Ok(spec)
}

/// The VMM ends by no will of its own.
fn ensure_killed(host: &Agent, vmm: u32) -> Result<()> {
    let code = host.wait(vmm, WAIT)?;
    ensure!(code.is_none(), "the VMM was not killed, it ended: {code:?}");
    Ok(())
}

/// A port's own words: it has ended this VMM before it was shut in, behind which it opens its NTB.
fn ensure_ended_first(port: &str, vmm: u32) -> Result<()> {
    let ends =
        format!("process {vmm}, a VMM, has the window of a port that is no more: it is ended");
    let order = [ends.as_str(), "shut in"].map(|words| port.find(words));
    let [Some(ended), Some(shut_in)] = order else {
        bail!("the port does not tell of its start: {port}");
    };
    ensure!(ended < shut_in, "the VMM was ended too late: {port}");
    Ok(())
}

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    // It goes behind the host that has an end of it.
    let cable = lab.cable("ntb-ac", &[])?;
    let setup = Setup {
        workers: Workers::Processes,
        second: Some(&cable),
        config: Some(third::config_of_a),
        ..Setup::default()
    };
    let attached = steps::attach(lab, checks, &setup, spec(lab, "g")?)?;
    let mut rig = Rig::new(lab, attached, &[])?;
    for victim in VICTIMS {
        if victim == Victim::BorrowerPort {
            checks.must("a third host agrees on a session with host a", || {
                rig.begin_third(&cable)
            })?;
        }
        let name = format!("{victim:?} stands still while its lease is revoked: no late store");
        checks.must(&name, || rig.strike(victim))?;
    }
    steps::detach(checks, rig.end()?)
}

fn run_mapped(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let borrow = &["--bars", "mapped", "--trust-vmm"];
    let setup = Setup {
        workers: Workers::Processes,
        borrow,
        ..Setup::default()
    };
    let attached = steps::attach(lab, checks, &setup, spec(lab, "g")?)?;
    let mut rig = Rig::new(lab, attached, borrow)?;
    checks.must("a VMM that stands still is ended with its lease", || {
        rig.revoke_from_mapped()
    })?;
    checks.must("a VMM that outlives its port is ended by the next", || {
        rig.kill_port_of_mapped()
    })?;
    checks.check("both hosts are as before", || {
        let Attached {
            guest,
            lending,
            fdid,
            before,
            pair,
            ..
        } = rig.end()?;
        guest.shut_down()?;
        lending.b.verb(&["return", &fdid])?;
        lending.end(&pair)?;
        pair.b.agent.sh(steps::FOLDERS_GO)?;
        pair.ensure_unchanged(&before)
    });
    Ok(())
}

impl Rig<'_> {
    fn socket(&self) -> &'static str {
        SOCKETS[self.tenants % SOCKETS.len()]
    }

    /// Its process, and the host that it runs on.
    fn process(&self, victim: Victim) -> Result<(u32, Agent)> {
        let Attached { lending, pair, .. } = &self.attached;
        let (a, b) = (pair.a.agent.clone(), pair.b.agent.clone());
        Ok(match victim {
            Victim::Vmm => (self.attached.guest.pid, b),
            Victim::Worker => {
                let status = lending.b.status()?;
                let pid = status["borrowed"][0]["worker"]["pid"].as_u64();
                (
                    pid.with_context(|| format!("no worker: {status}"))? as u32,
                    b,
                )
            }
            Victim::BorrowerPort => (lending.b.port_pid().context("no port")?, b),
            Victim::LenderPort => (lending.a.port_pid().context("no port")?, a),
        })
    }

    /// The tenant's I/O, and beside it stores into a register, for as long as there is a function.
    fn at_work(&self) -> Result<()> {
        let guest = &self.attached.guest.agent;
        let register = pci::bar_address(guest, &pci::find_nvme(guest)?, 0)? + AQA;
        let stores = format!("while lab-agent devmem write {register} {PATTERN}; do echo; done");
        guest.spawn(&["sh", "-c", steps::ENDLESS_IO], IO_LOG)?;
        guest.spawn(&["sh", "-c", READS], READ_LOG)?;
        guest.spawn(&["sh", "-c", &stores], STORE_LOG)?;
        let logs = format!("test -s {IO_LOG} && test -s {READ_LOG} && test -s {STORE_LOG}");
        guest.wait_until(&logs, WAIT)?;
        let seen = self.registers()?;
        ensure!(seen.aqa == PATTERN, "the stores do not arrive: {seen:x?}");
        Ok(())
    }

    fn registers(&self) -> Result<NvmeRegisters> {
        pci::nvme_registers(&self.attached.pair.a.agent, VF_BDF)
    }

    fn strike(&mut self, victim: Victim) -> Result<String> {
        self.at_work()?;
        let (pid, host) = self.process(victim)?;
        host.kill(pid, SIGSTOP)?;
        host.wait_until(&format!("grep -q '^State:.T' /proc/{pid}/status"), WAIT)?;
        let mut elsewhere = String::new();
        match victim {
            Victim::Vmm => self.revoke()?,
            Victim::Worker => {
                self.revoke()?;
                // A store of it could only come later, from a process that is no more.
                let gone = host.wait_until(&format!("! kill -0 {pid}"), WAIT);
                gone.context("the worker outlives its lease, standing still")?;
            }
            Victim::BorrowerPort => {
                self.revoke()?;
                // Its worker does not know yet, and stores.
                self.stores_go_on(&self.attached.guest)?;
                self.registers()?.ensure_reset()?;
                let pieces = self.lend_on_elsewhere(pid)?;
                elsewhere = format!("{pieces} pieces at host c were right; ");
            }
            // Nobody but this port can take its lease away, so that nothing can be lent on before it
            // goes on: the old VMM and its worker store beside the next tenant, who comes then.
            Victim::LenderPort => self.revoke_of_frozen_port(pid)?,
        }
        let next = self.lend_on_beside()?;
        self.late_stores_come(victim)?;
        Ok(elsewhere + &self.take_over(next, None)?)
    }

    /// The old tenant stands still until the next is up, as TCG's nested SVM does not stand a guest
    /// that boots beside one at work.
    fn lend_on_beside(&mut self) -> Result<Next> {
        let (old, b) = self.process(Victim::Vmm)?;
        // One that has ended by itself is none to stop.
        let tell = |signal| b.sh(&format!("kill -{signal} {old} 2>/dev/null || :"));
        tell(SIGSTOP)?;
        let next = self.lend_on()?;
        tell(SIGCONT)?;
        Ok(next)
    }

    /// The old tenant's stores go on beside the next. A QEMU that loses its worker while it runs may
    /// end by an assertion of its own instead.
    fn late_stores_come(&self, victim: Victim) -> Result<()> {
        let Err(error) = self.stores_go_on(&self.attached.guest) else {
            return Ok(());
        };
        ensure!(victim != Victim::Vmm, "no late store: {error:#}");
        let (old, b) = self.process(Victim::Vmm)?;
        let ended = b.wait(old, Duration::ZERO).map(drop);
        ended.with_context(|| format!("neither stores nor an end: {error:#}"))
    }

    /// Stopped, with the lender's registers in its guest's page tables.
    fn revoke_from_mapped(&mut self) -> Result<String> {
        self.at_work()?;
        let (pid, b) = self.process(Victim::Vmm)?;
        b.sh(&format!("test -s {HOLDERS}/{pid}"))?;
        b.kill(pid, SIGSTOP)?;
        b.wait_until(&format!("grep -q '^State:.T' /proc/{pid}/status"), WAIT)?;
        let freed = Freed::by(&b, self.attached.guest.memory_mib.into(), || {
            self.revoke()?;
            ensure_killed(&b, pid)
        })?;
        let next = self.lend_on()?;
        self.take_over(next, Some(freed))
    }

    fn kill_port_of_mapped(&mut self) -> Result<String> {
        self.at_work()?;
        let (pid, b) = self.process(Victim::Vmm)?;
        let (worker, _) = self.process(Victim::Worker)?;
        self.attached.lending.b.kill_port()?;
        let lives = |pid| format!("grep -q '^State:.[^ZX]' /proc/{pid}/status");
        b.wait_until(&format!("! {}", lives(worker)), WAIT)?;
        b.sh(&lives(pid))
            .context("the VMM ended by itself: nothing is shown")?;
        let log = self.lab.dir.join("port-b.log");
        let of_killed = fs::read_to_string(&log)?.len();
        let guest_mib = self.attached.guest.memory_mib.into();
        let freed = Freed::by(&b, guest_mib, || {
            self.attached.lending.b.start_port()?;
            // It answers, and so has opened its NTB.
            let gone = b.sh(&format!("! {}", lives(pid)));
            gone.context("a port serves while a VMM has its window")?;
            ensure_ended_first(&fs::read_to_string(&log)?[of_killed..], pid)?;
            ensure_killed(&b, pid)
        })?;
        self.attached.lending.wait_link()?;
        // On the socket that the killed port left behind.
        self.tenants += SOCKETS.len();
        let next = self.move_in()?;
        self.take_over(next, Some(freed))
    }

    /// The operator's word is answered when the function is nobody's.
    fn revoke(&self) -> Result<()> {
        let state = self.attached.lending.a.verb(&["revoke", VF_BDF])?;
        let seen = self.registers()?;
        seen.ensure_reset().with_context(|| state)
    }

    /// The same, asked for while the port cannot hear it.
    fn revoke_of_frozen_port(&self, pid: u32) -> Result<()> {
        let a = &self.attached.pair.a.agent;
        let program = self.lab.share_binary("sublet")?;
        let revoke = a.spawn(&[&program, "revoke", VF_BDF], REVOKE_LOG)?;
        // The daemon has asked when a connection to the port waits to be accepted: one that has no
        // inode yet. The daemon's network is its own, and so is the list.
        let asked = format!(
            "grep -qE ' 02 +0 .*/ports/{PORT}/control.sock' /proc/{}/net/unix",
            self.attached.lending.a.pid()
        );
        let asked = a.wait_until(&asked, WAIT);
        asked.context("the port is not asked to revoke")?;
        a.kill(pid, SIGCONT)?;
        let code = a.wait(revoke, WAIT)?;
        let said = a.text(REVOKE_LOG)?;
        a.sh(&format!("rm {REVOKE_LOG}"))?;
        ensure!(code == Some(0), "revoke ended with {code:?}: {said}");
        self.registers()?.ensure_reset()
    }

    /// The guest of the lost lease lives, and its stores end somewhere.
    fn stores_go_on(&self, guest: &Guest) -> Result<()> {
        let count = format!("wc -l < {STORE_LOG}");
        let before: u64 = guest.agent.sh(&count)?.trim().parse()?;
        let more = format!("test $({count}) -ge {}", before + LATE);
        guest.agent.wait_until(&more, WAIT)?;
        Ok(())
    }

    /// The same function to another tenant, with the old one's VMM still there.
    fn lend_on(&mut self) -> Result<Next> {
        let Attached { lending, fdid, .. } = &self.attached;
        lending.b.wait_status("lost lease", WAIT, is_lost)?;
        lending.b.verb(&["return", fdid])?;
        self.tenants += 1;
        self.move_in()
    }

    fn move_in(&self) -> Result<Next> {
        let Attached {
            lending,
            fdid,
            pair,
            ..
        } = &self.attached;
        lending.borrow(fdid, self.socket(), self.borrow)?;
        let mut spec = spec(self.lab, &format!("g{}", self.tenants))?;
        spec.early = EARLY_BYSTANDER.to_owned();
        let guest = self.lab.boot_guest(&spec.device(self.socket()), &pair.b)?;
        steps::wait_namespace(&guest.agent)?;
        let memory = Client::early_bystander(&guest.agent)?;
        memory.look(0).context("the next tenant's memory")?;
        Ok(Next { guest, memory })
    }

    /// The new tenant's function, bytes and memory are its own, and both hosts' memory is nobody's;
    /// then the old one's VMM goes, if it is there yet, and what that frees is nobody's either while
    /// the new tenant works on.
    fn take_over(&mut self, next: Next, freed: Option<Freed>) -> Result<String> {
        let Next { guest, memory } = next;
        self.work_as_next(&guest)?;
        memory.look(1).context("the next tenant's memory")?;
        let old = std::mem::replace(&mut self.attached.guest, guest);
        let last_mib = old.memory_mib.into();
        old.clear_away()?;
        let Attached { pair, guest, .. } = &self.attached;
        let freed = match freed {
            Some(freed) => freed,
            None => Freed::fill(&pair.b.agent, last_mib, guest.memory_mib.into())?,
        };
        let written = self.work_as_next(guest)?;
        memory.look(2).context("the next tenant's memory")?;
        self.look_at_bystanders()?;
        let mib = freed.ensure_whole()?;
        Ok(format!(
            "{written}; {mib} MiB, the {last_mib} of the last guest among them, were filled when its \
             VMM had ended, and are as they were"
        ))
    }

    /// It writes, and all that it has written is there.
    fn work_as_next(&self, guest: &Guest) -> Result<String> {
        let written = steps::write_and_read_back(&guest.agent, BYTES)?;
        let read = dio(&self.attached.pair.a.agent, "read", BYTES, None)?;
        ensure!(
            written == read,
            "the guest wrote {written}, host a has {read}"
        );
        self.ensure_no_store_of_last()?;
        Ok(written)
    }

    /// The function runs for whoever has it now.
    fn ensure_no_store_of_last(&self) -> Result<()> {
        let seen = self.registers()?;
        ensure!(
            seen.cc & 1 == 1 && seen.aqa != PATTERN,
            "the next tenant's function bears a store of the last's: {seen:x?}"
        );
        Ok(())
    }

    /// Memory that is no tenant's is as it was.
    fn look_at_bystanders(&mut self) -> Result<()> {
        self.looks += 1;
        let mut all = self.bystanders.iter();
        all.try_for_each(|bystander| bystander.look(self.looks))
    }
}
