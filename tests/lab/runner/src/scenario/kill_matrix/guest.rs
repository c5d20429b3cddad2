//! A real guest at work: its stock driver writes without end while somebody is struck, or while it shuts down.

use super::cell::{Cell, Victim, Work};
use super::rig::Rig;
use super::stages::SOCKET;
use crate::agent::SIGKILL;
use crate::guest::GuestSpec;
use crate::scenario::steps::{self, dio};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::{Duration, Instant};

const BYTES: u64 = 64 << 10;
const IO_TIMEOUT: Duration = Duration::from_secs(60);
const IO_LOG: &str = "/tmp/io";
/// What a kernel says when it has shut its devices down, and when it was told to crash.
const POWERED_OFF: &str = "reboot: Power down";
const CRASHED: &str = "Kernel panic - not syncing: sysrq triggered crash";

/// The guest's endless writes.
pub struct AtWork {
    io: u32,
    lease: Value,
}

impl Rig<'_> {
    /// A guest, booted if there is none, that has begun to write.
    pub fn guest_at_work(&mut self) -> Result<AtWork> {
        if self.guest.is_none() {
            self.lending.borrow(&self.fdid, SOCKET, &[])?;
            self.guests += 1;
            let name = format!("g{}", self.guests);
            let spec = GuestSpec::stock(&name, &self.lab.vmm()?);
            let boot = || steps::boot(self.lab, &self.pair, spec);
            self.guest = Some(self.while_witness_rests(boot)?);
            self.whole()?;
        }
        let lease = self.lease()?;
        let agent = &self.guest.as_ref().context("no guest")?.agent;
        let io = agent.spawn(&["sh", "-c", steps::ENDLESS_IO], IO_LOG)?;
        agent.wait_until(&format!("test -s {IO_LOG}"), IO_TIMEOUT)?;
        Ok(AtWork { io, lease })
    }

    fn lease(&self) -> Result<Value> {
        let status = self.lending.a.status()?;
        let lease = self.lent(&status)["lease"].clone();
        ensure!(lease.is_string(), "nothing is lent: {status}");
        Ok(lease)
    }

    /// What the guest writes comes back to it, and lies in host A's blocks.
    fn whole(&self) -> Result<()> {
        let guest = self.guest.as_ref().context("no guest")?;
        let written = steps::write_and_read_back(&guest.agent, BYTES)?;
        let read = dio(&self.pair.a.agent, "read", BYTES, None)?;
        ensure!(
            written == read,
            "the guest wrote {written}, host a has {read}"
        );
        Ok(())
    }

    /// The guest is gone before it can answer.
    pub fn crash_guest(&self) -> Result<()> {
        let guest = self.guest.as_ref().context("no guest")?;
        let crash = ["sh", "-c", "echo c > /proc/sysrq-trigger"];
        let _ = guest.agent.spawn(&crash, "/dev/null");
        self.pair.b.agent.wait(guest.pid, IO_TIMEOUT).map(drop)
    }

    /// The guest powers off under I/O, of which it caches nothing, and its kernel crashes while it
    /// does so.
    pub fn shut_down_and_crash(&self, after: Duration) -> Result<()> {
        let crash = format!("usleep {}; echo c > /proc/sysrq-trigger", after.as_micros());
        self.shut_down(&format!("{{ {crash}; }} & "))
    }

    fn shut_down(&self, beside: &str) -> Result<()> {
        let guest = self.guest.as_ref().context("no guest")?;
        let script = format!("{beside}exec poweroff -n -f");
        // The answer may be lost with the guest: what counts is the end of its VMM.
        let _ = guest.agent.spawn(&["sh", "-c", &script], "/dev/null");
        Ok(())
    }

    /// Whether the guest that was told so has crashed, and not powered off before.
    pub fn has_crashed(&self) -> Result<bool> {
        let guest = self.guest.as_ref().context("no guest")?;
        let host = &self.pair.b.agent;
        host.wait(guest.pid, IO_TIMEOUT).context("it hangs")?;
        let console = host.text(&guest.console)?;
        Ok(console.contains(CRASHED))
    }

    /// How long a guest's kernel that writes takes to shut down, by one that may.
    pub fn measure_shut_down(&mut self) -> Result<Duration> {
        self.guest_at_work()?;
        let since = Instant::now();
        self.shut_down("")?;
        let guest = self.guest.as_ref().context("no guest")?;
        let host = &self.pair.b.agent;
        let off = format!("grep -q '{POWERED_OFF}' {}", guest.console);
        host.wait_until(&off, IO_TIMEOUT)?;
        let took = since.elapsed();
        host.wait(guest.pid, IO_TIMEOUT)?;
        self.clear_guest_away()?;
        self.reclaim()?;
        self.note(Work::ShutDown, took);
        Ok(took)
    }

    /// The writes go on, where the path does; else the guest's VMM is cleared away, and of a lease
    /// that lives through that there is the same.
    pub fn end_of_io(&mut self, at_work: AtWork, cell: Cell) -> Result<String> {
        let AtWork { io, lease } = at_work;
        if !cell.is_survived() {
            self.clear_guest_away()?;
            if matches!(cell.victim, Victim::Vmm | Victim::GuestKernel) {
                ensure!(self.lease()? == lease, "another lease");
            }
            return Ok("the guest is gone".to_owned());
        }
        let agent = &self.guest.as_ref().context("no guest")?.agent;
        let lines = format!("wc -l < {IO_LOG}");
        let before: u64 = agent.sh(&lines)?.trim().parse()?;
        let more = format!("test $({lines}) -gt {}", before + 1);
        agent.wait_until(&more, IO_TIMEOUT)?;
        agent.kill(io, SIGKILL)?;
        agent.wait(io, IO_TIMEOUT)?;
        agent.sh(&format!("rm {IO_LOG}"))?;
        self.whole()?;
        Ok("I/O goes on".to_owned())
    }

    /// Whatever is left of the guest goes; a dead VMM is no error.
    pub fn clear_guest_away(&mut self) -> Result<()> {
        let Some(guest) = self.guest.take() else {
            return Ok(());
        };
        let host = &self.pair.b.agent;
        if host.sh(&format!("kill -0 {}", guest.pid)).is_ok() {
            host.kill(guest.pid, SIGKILL)?;
            host.wait(guest.pid, IO_TIMEOUT)?;
        }
        host.sh("rm -f /run/guest-*").map(drop)
    }
}
