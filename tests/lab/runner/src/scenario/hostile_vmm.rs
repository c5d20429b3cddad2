//! Scenario `hostile-vmm`: two tenants of one port; whatever the first one's VMM does, the second's I/O goes on, and the port's heart beats.

use super::steps::SOCKET;
use super::vf::Vf;
use super::{Scenario, When};
use crate::agent::Agent;
use crate::check::Checks;
use crate::host::HostSpec;
use crate::lab::{Lab, Pair};
use crate::pci;
use crate::snapshot::Snapshot;
use crate::sublet::{Lending, Workers, edited};
use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::scope;
use std::time::{Duration, Instant};

/// The VMMs are the agent's own clients: a guest would only make the hosts slower.
pub const SCENARIO: Scenario = Scenario {
    name: "hostile-vmm",
    checks: 3 + ATTACKS.len() + 7,
    when: When::Full,
    own_model: None,
    deadline: Duration::from_secs(900),
    run,
};

/// What the hostile VMM does (a case of `lab-agent hostile`), and what tells that it bites.
struct Attack {
    what: &'static str,
    case: &'static str,
    /// Of a status of the lender and of the hostile lease, while it goes on.
    bites: fn(&Value, &Value) -> bool,
    /// What the borrower says of the last session afterwards; empty: nothing.
    words: &'static str,
}

const ATTACKS: [Attack; 8] = [
    Attack {
        what: "a flood of messages",
        case: "flood",
        bites: |_, lease| lease["counters"]["messages"].as_u64() > Some(1000),
        words: "",
    },
    Attack {
        what: "a flood that the worker hands on to its port",
        case: "far",
        bites: |_, lease| lease["worker"]["slowed"].as_u64() > Some(0),
        words: "",
    },
    Attack {
        what: "answers that nobody reads",
        case: "unread",
        bites: |_, lease| lease["state"] == "connected",
        words: "",
    },
    Attack {
        what: "a storm into an eventfd at its limit",
        case: "storm",
        bites: |lender, _| limits(lender, 0) > 0 && limits(lender, 1) == 0,
        words: "",
    },
    Attack {
        what: "memory of a file system that answers no read",
        case: "fuse",
        bites: |_, lease| told(lease).contains("no memfd or hugetlbfs file"),
        words: "no memfd or hugetlbfs file",
    },
    Attack {
        what: "memory that is truncated under DMA, and before it is pinned",
        case: "truncated",
        bites: |_, lease| lease["counters"]["dma_maps"] == 2,
        words: "pinning guest memory failed: there are no pages behind",
    },
    Attack {
        what: "a hole punched under DMA",
        case: "punched",
        bites: |_, lease| lease["counters"]["dma_maps"] == 2,
        words: "",
    },
    Attack {
        what: "maps without end, and one more than there can be",
        case: "maps",
        bites: |_, lease| lease["counters"]["dma_maps"].as_u64() > Some(1000),
        words: "the guest has 65535 DMA maps already, the most it may have",
    },
];

/// The witness's function: the VF after the hostile tenant's.
const SECOND: Vf = Vf {
    bdf: "0000:01:00.2",
    controller: 2,
    socket: "/run/sublet/second.sock",
};
const LOG: &str = "/run/witness.log";
const OUTPUT: &str = "/run/witness.out";
const STOP: &str = "/run/witness.stop";
const REPORT: &str = "/run/hostile.log";
/// Where the hostile VMM's file system is.
const FUSE_DIR: &str = "/run/hostile";
/// What the limits are here: an emulated host is slow, and they are to be reached. `memory_check`
/// is off, as a look at the VMM's memory map for each of 65,536 maps would take most of the time.
const EDITS: [(&str, &str); 4] = [
    ("worker_messages_per_second = ", "20"),
    ("interrupts_per_second = ", "100"),
    ("memory_check = ", "\"off\""),
    ("lost_after_ms = ", "1500"),
];
/// How much the witness's pieces may take beside an attack, of what they take without.
const RATIO_MAX: f64 = 2.0;
const ATTACK_TIMEOUT: Duration = Duration::from_secs(120);
const TOLD_TIMEOUT: Duration = Duration::from_secs(30);
/// `return`, where the worker does not end.
const RETURN_TIMEOUT: Duration = Duration::from_secs(15);
/// Whether each of the witness's next pieces is there.
const PIECES: &str = "test $(wc -l < /run/witness.log) -ge";
/// Ends every wait for a FUSE file system's server.
const ABORT: &str = "mount -t fusectl fusectl /sys/fs/fuse/connections && \
     for abort in /sys/fs/fuse/connections/*/abort; do echo 1 > $abort; done; \
     umount /sys/fs/fuse/connections";
const LOOK: Duration = Duration::from_millis(500);
/// Looks at the heartbeat before the first attack: what an emulated host makes of it at rest.
const QUIET_LOOKS: usize = 20;
/// Of the sample configurations.
const BEAT_MS: u64 = 250;
/// One look in so many may find a late heartbeat: an emulated host stands still by itself.
const LOOKS_OF_LATE: usize = 50;
/// What a kernel says when something of it is broken.
const KERNEL_FAULTS: &str = "BUG:|WARNING:|Oops|Call Trace|protection fault|blocked for more than|soft lockup|bad page|Bad page";

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let mut pair = None;
    checks.must("both hosts boot, the borrower with FUSE", || {
        pair = Some(boot(lab)?);
        Ok("")
    })?;
    let pair = pair.context("no hosts")?;
    pci::wait_namespace(&pair.a.agent)?;
    let before = pair.snapshot()?;
    let mut lending = None;
    checks.must("both daemons agree on a session", || {
        let daemons = (1, Workers::Processes);
        let started = Lending::start_with(lab, &pair, (2, 1), daemons, edit)?;
        let session = started.wait_link()?;
        lending = Some(started);
        Ok(session)
    })?;
    let lending = lending.context("no daemons")?;
    let mut tenants = None;
    checks.must("two tenants have a VF each, one of them is at work", || {
        let moved_in = Tenants::move_in(&pair, &lending)?;
        let both = moved_in.fdids.join(" and ");
        tenants = Some(moved_in);
        Ok(both)
    })?;
    let tenants = tenants.context("no tenants")?;
    let faults = tenants.kernel_faults()?;
    let beats = tenants.while_it_beats(|| {
        for attack in &ATTACKS {
            let name = format!("{} costs its own tenant alone", attack.what);
            checks.check(&name, || tenants.suffer(attack));
        }
        let name = "a worker that stands in a file that does not close keeps nobody waiting";
        checks.check(name, || tenants.outlive_a_stuck_worker());
    });
    checks.check("the port's heart has beaten all the time", || beats);
    checks.check("neither kernel has complained", || {
        let now = tenants.kernel_faults()?;
        ensure!(now == faults, "the kernels' logs say {now:?}");
        Ok("")
    });
    checks.check("the next VMM of the hostile tenant's is served", || {
        let served = ["lab-agent", "vfio-user", SOCKET, "good"];
        tenants.b.run(&served)
    });
    checks.check("nothing of the hostile sessions is left", || {
        tenants.wait_idle()?;
        pair.ensure_unchanged(&tenants.quiet)
    });
    checks.check("every byte of the witness was right", || tenants.move_out());
    checks.check("both hosts are as before", || {
        lending.end(&pair)?;
        pair.ensure_unchanged(&before)
    });
    Ok(())
}

fn boot(lab: &Lab) -> Result<Pair> {
    let ntb = lab.ntb(&[])?;
    let a = HostSpec::stock("a", &lab.cache)?
        .lender()
        .ntb(&ntb.socket_a);
    let mut b = HostSpec::stock("b", &lab.cache)?.ntb(&ntb.socket_b);
    b.modules.push("fuse".to_owned());
    lab.boot(&a, &b, Some(ntb))
}

/// A sample configuration with this scenario's limits.
fn edit(config: &str) -> String {
    edited(config, &EDITS)
}

/// How often the vector of the n-th lent function was over its rate.
fn limits(lender: &Value, function: usize) -> u64 {
    let limits = &lender["lent"][function]["vectors"][0]["rate_limits"];
    limits.as_u64().unwrap_or(0)
}

/// Why a lease's last session ended.
fn told(lease: &Value) -> &str {
    lease["last_error"].as_str().unwrap_or_default()
}

/// Of the heartbeat's ages at rest and beside the attacks.
fn ensure_no_beat_is_missed(quiet_ms: &[u64], ages_ms: &[u64]) -> Result<String> {
    let oldest = |ages: &[u64]| ages.iter().copied().max().context("nobody has looked");
    let (quiet, beside) = (oldest(quiet_ms)?, oldest(ages_ms)?);
    let limit_ms = (3 * quiet).max(quiet + 2 * BEAT_MS);
    let (looks, late) = (ages_ms.len(), ages_ms.iter().filter(|age| **age > limit_ms));
    let told = format!("the oldest of {looks} was {beside} ms, at rest {quiet} ms");
    ensure!(
        late.count() <= looks / LOOKS_OF_LATE,
        "{told}; the limit is {limit_ms} ms: {ages_ms:?}"
    );
    Ok(told)
}

/// Both have borrowed, the hostile one first; the witness is at work.
struct Tenants<'a> {
    a: &'a Agent,
    b: &'a Agent,
    lending: &'a Lending,
    fdids: [String; 2],
    witness: u32,
    quiet: (Snapshot, Snapshot),
}

impl<'a> Tenants<'a> {
    fn move_in(pair: &'a Pair, lending: &'a Lending) -> Result<Self> {
        let (a, b) = (&pair.a.agent, &pair.b.agent);
        let hostile = lending.offer()?;
        lending.borrow(&hostile, SOCKET, &[])?;
        let second = SECOND.lend(a, lending)?;
        let argv = ["lab-agent", "witness", SECOND.socket, STOP, LOG];
        let witness = b.spawn(&argv, OUTPUT)?;
        b.wait_until(&format!("test $(wc -l < {LOG}) -ge 10"), TOLD_TIMEOUT)
            .with_context(|| b.text(OUTPUT).unwrap_or_default())?;
        let quiet = pair.snapshot()?;
        Ok(Tenants {
            a,
            b,
            lending,
            fdids: [hostile, second],
            witness,
            quiet,
        })
    }

    /// One attack, seen to bite, and what it costs the witness.
    fn suffer(&self, attack: &Attack) -> Result<String> {
        let argv = ["lab-agent", "hostile", SOCKET, attack.case, LOG];
        let pid = self.b.spawn(&argv, REPORT)?;
        let bitten = self.wait_bite(attack);
        let code = self.b.wait(pid, ATTACK_TIMEOUT)?;
        let report = self.b.text(REPORT)?;
        self.b.sh(&format!("rm {REPORT}"))?;
        ensure!(code == Some(0), "it ended with {code:?}: {report}");
        bitten?;
        let lease = self.wait_idle()?;
        let words = told(&lease);
        ensure!(
            words.contains(attack.words),
            "{words:?} does not say {:?}",
            attack.words
        );
        let other = self.lease(1)?;
        ensure!(
            told(&other).is_empty(),
            "the witness is told {}",
            told(&other)
        );
        let figures: Value = serde_json::from_str(&report)?;
        ensure!(
            figures["ratio"]
                .as_f64()
                .is_some_and(|ratio| ratio < RATIO_MAX),
            "the witness's latency: {report}"
        );
        ensure!(
            figures["did"].as_u64() > Some(0),
            "it did nothing: {report}"
        );
        Ok(format!("{report} {words}"))
    }

    /// No signal ends the wait of a worker that closes its VMM's FUSE file. Its lease is returned all
    /// the same, its function is the next one's, and it ends when the file system does.
    fn outlive_a_stuck_worker(&self) -> Result<String> {
        let worker = self.lease(0)?["worker"]["pid"].as_u64();
        let worker = worker.context("no worker")?;
        let vmm = self
            .b
            .spawn(&["lab-agent", "hostile", SOCKET, "stuck", LOG], REPORT)?;
        // In close(2).
        let stands = format!("grep -q '^3 ' /proc/{worker}/task/*/syscall");
        self.b.wait_until(&stands, TOLD_TIMEOUT)?;
        let began = Instant::now();
        let returned = self
            .lending
            .b
            .try_verb(&["return", &self.fdids[0]], RETURN_TIMEOUT);
        let (returned, took) = (returned?, began.elapsed());
        ensure!(returned.code == Some(0), "`return` says {returned:?}");
        self.b
            .sh(&stands)
            .context("the worker does not stand any more")?;
        let log = self.b.text(LOG)?.lines().count();
        self.b
            .wait_until(&format!("{PIECES} {}", log + 10), TOLD_TIMEOUT)?;
        self.lending.borrow(&self.fdids[0], SOCKET, &[])?;
        self.b.run(&["lab-agent", "vfio-user", SOCKET, "good"])?;
        self.b
            .sh(&stands)
            .context("the worker does not stand any more")?;
        self.b.sh(ABORT)?;
        self.b
            .wait_until(&format!("test ! -e /proc/{worker}"), TOLD_TIMEOUT)?;
        self.b.kill(vmm, 9)?;
        self.b.wait(vmm, TOLD_TIMEOUT)?;
        self.b.sh(&format!(
            "umount -l {FUSE_DIR} && rmdir {FUSE_DIR} && rm {REPORT}"
        ))?;
        Ok(format!("`return` took {} ms", took.as_millis()))
    }

    fn wait_bite(&self, attack: &Attack) -> Result<()> {
        let bites = |lender: &Value| {
            self.lease(0)
                .is_ok_and(|lease| (attack.bites)(lender, &lease))
        };
        let waited = self.lending.a.wait_status("bite", TOLD_TIMEOUT, bites);
        waited.map(drop)
    }

    /// What host B tells of a tenant.
    fn lease(&self, tenant: usize) -> Result<Value> {
        let status = self.lending.b.status()?;
        let leases = status["borrowed"].as_array().context("no leases")?;
        let lease = leases
            .iter()
            .find(|lease| lease["fdid"] == self.fdids[tenant].as_str());
        lease.cloned().context("the lease is gone")
    }

    /// The hostile session is over and undone.
    fn wait_idle(&self) -> Result<Value> {
        let idle = |_: &Value| self.lease(0).is_ok_and(|lease| lease["state"] == "waiting");
        self.lending
            .b
            .wait_status("idle endpoint", TOLD_TIMEOUT, idle)?;
        self.lease(0)
    }

    /// Looks at the borrower's heartbeat while something is done. It is no older than it was before,
    /// two beats more or thrice as much; and the session that both ports had is the one they have.
    fn while_it_beats(&self, act: impl FnOnce()) -> Result<String> {
        let (stop, since) = (AtomicBool::new(false), self.sessions()?);
        let quiet = (0..QUIET_LOOKS).map(|_| self.heartbeat_age_ms());
        let quiet_ms = quiet.collect::<Result<Vec<_>>>()?;
        let ages_ms = scope(|scope| {
            let looking = scope.spawn(|| {
                let mut ages_ms = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    ages_ms.push(self.heartbeat_age_ms()?);
                }
                Ok::<_, anyhow::Error>(ages_ms)
            });
            act();
            stop.store(true, Ordering::Relaxed);
            looking.join().map_err(|_| anyhow!("panicked"))?
        })?;
        let now = self.sessions()?;
        ensure!(now == since, "the sessions were {since:?}, are {now:?}");
        ensure_no_beat_is_missed(&quiet_ms, &ages_ms)
    }

    /// How old the borrower's heartbeat is at the lender, a moment from now.
    fn heartbeat_age_ms(&self) -> Result<u64> {
        std::thread::sleep(LOOK);
        let age = self.lending.a.status()?["ports"][0]["mailbox"]["heartbeat_age_ms"].as_u64();
        age.context("no heartbeat")
    }

    fn sessions(&self) -> Result<[Value; 2]> {
        let id = |status: Value| status["ports"][0]["session"]["id"].clone();
        Ok([id(self.lending.a.status()?), id(self.lending.b.status()?)])
    }

    fn kernel_faults(&self) -> Result<[String; 2]> {
        let say = format!("dmesg | grep -E '{KERNEL_FAULTS}' || :");
        Ok([self.a.sh(&say)?, self.b.sh(&say)?])
    }

    /// The witness ends, all is returned, and only the hostile tenant's VF is left to the lender.
    fn move_out(&self) -> Result<String> {
        self.b.sh(&format!("touch {STOP}"))?;
        let code = self.b.wait(self.witness, TOLD_TIMEOUT)?;
        let said = self.b.text(OUTPUT)?;
        ensure!(code == Some(0), "the witness ended with {code:?}: {said}");
        self.b.sh(&format!("rm {STOP} {LOG} {OUTPUT}"))?;
        let [hostile, second] = &self.fdids;
        self.lending.b.verb(&["return", hostile])?;
        SECOND.take_back(self.a, self.lending, second)?;
        Ok(said)
    }
}

#[cfg(test)]
mod tests {
    use super::{LOOKS_OF_LATE, ensure_no_beat_is_missed};

    #[test]
    fn heartbeat_that_comes_late_again_and_again_is_a_failure() {
        let quiet = [240, 260];
        let mut ages = vec![250; LOOKS_OF_LATE - 2];
        assert!(ensure_no_beat_is_missed(&quiet, &ages).is_ok());
        ages.push(781);
        assert!(ensure_no_beat_is_missed(&quiet, &ages).is_err());
        ages.push(780);
        assert!(ensure_no_beat_is_missed(&quiet, &ages).is_ok());
        ages.push(781);
        assert!(ensure_no_beat_is_missed(&quiet, &ages).is_err());
        assert!(ensure_no_beat_is_missed(&quiet, &[]).is_err());
    }
}
