//! Scenario `two-tenants`: two tenants behind one port, each at work on a VF of its own; what the first one's guest tries, its VMM and the other host reaches nothing of the second's.

use super::isolation::{faults_seen, refused};
use super::rounds::Rounds;
use super::second::Second;
use super::steps::{self, ATTACH_CHECKS, Attached, DETACH_CHECKS, Setup};
use super::vf::Vf;
use super::{Scenario, When};
use crate::agent::Agent;
use crate::check::Checks;
use crate::guest::GuestSpec;
use crate::host::NTB_BDF;
use crate::lab::{Lab, Pair};
use crate::pci;
use crate::sublet::{Lending, Workers, edited, ensure_no_lost_interrupt};
use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;
use std::sync::OnceLock;
use std::time::Duration;

/// One port, two tenants, and everybody but the second is hostile.
pub const SCENARIO: Scenario = Scenario {
    name: "two-tenants",
    checks: ATTACH_CHECKS + 18 + DETACH_CHECKS,
    when: When::Full,
    own_model: None,
    deadline: Duration::from_secs(1200),
    run,
};

/// What the first tenant has beside the function that its guest drives by hand: one on which the
/// guest works all the time, and one for a VMM that means harm.
const AT_WORK: Vf = Vf {
    bdf: "0000:01:00.3",
    controller: 3,
    socket: "/run/sublet/work.sock",
};
const HARMFUL: Vf = Vf {
    bdf: "0000:01:00.4",
    controller: 4,
    socket: "/run/sublet/harm.sock",
};
/// Where the guest's pieces lie, and how large they are. All functions have one namespace.
const WORK_OFFSET: u64 = 16 << 20;
const WORK_BYTES: u64 = 16 << 10;
const BYTES: u64 = 64 << 10;

const MIB: u64 = 1 << 20;
/// The guest's RAM.
const RAM_BYTES: u64 = 128 * MIB;
/// Bytes of the window that nobody can have been given: its far end.
const WINDOW_FAR: u64 = 900 * MIB;
/// PROTOCOL.md: where the slot lies in the mailbox; its session, checksum, a request's lease, and
/// the commit word in it.
const SLOT_OFFSET: u64 = 0x1000;
const SLOT_SESSION: u64 = 0;
const SLOT_CRC: u64 = 32;
const SLOT_LEASE: u64 = 48;
const SLOT_COMMIT: u64 = 4088;
const TOLD_TIMEOUT: Duration = Duration::from_secs(20);
/// Of a vector's interrupts in a second, here: what an emulated storm reaches, and I/O does not.
const RATE: (&str, &str) = ("interrupts_per_second = ", "20");
const STORM_STOP: &str = "/run/storm.stop";
const STORM_LOG: &str = "/run/storm.log";

fn spec(lab: &Lab) -> Result<GuestSpec> {
    let mut spec = GuestSpec::stock("g", &lab.vmm()?).device(AT_WORK.socket);
    // One hugepage for the queues of the guest's own tool.
    spec.cmdline = "hugepages=1 iomem=relaxed".to_owned();
    // Each function's path to the namespace is a block device of its own.
    spec.modules.insert(0, "nvme_core multipath=N".to_owned());
    Ok(spec)
}

/// A sample configuration with a limit that can be reached.
fn config(text: &str) -> String {
    edited(text, &[RATE])
}

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let more = OnceLock::new();
    let lend = |pair: &Pair, lending: &Lending| {
        let a = &pair.a.agent;
        let _ = more.set([AT_WORK.lend(a, lending)?, HARMFUL.lend(a, lending)?]);
        Ok(())
    };
    let setup = Setup {
        more_vfs: 3,
        workers: Workers::Processes,
        config: Some(config),
        before_boot: Some(&lend),
        ..Setup::default()
    };
    let attached = steps::attach(lab, checks, &setup, spec(lab)?)?;
    let [work, harm] = more.get().context("nothing more is lent")?;
    let mut second = None;
    checks.must("a second guest has a VF behind the same port", || {
        let moved_in = Second::move_in(lab, &attached)?;
        let fdid = moved_in.fdid.clone();
        second = Some(moved_in);
        Ok(fdid)
    })?;
    let second = second.context("no second tenant")?;
    let ended = beside_each_other(checks, &attached, &second, harm)?;
    let [first_ended, second_ended] = ended;
    checks.check("every byte of the first tenant was right", || {
        let rounds = first_ended?;
        ensure_no_lost_interrupt(&attached.guest.dmesg("polled|timeout")?)?;
        Ok(format!("{rounds} rounds of {WORK_BYTES} bytes"))
    });
    checks.check("every byte of the second tenant was right", || {
        second.move_out(&attached, second_ended?)
    });
    steps::detach_with(checks, attached, |pair, lending| {
        AT_WORK.take_back(&pair.a.agent, lending, work)?;
        HARMFUL.take_back(&pair.a.agent, lending, harm)
    })
}

/// Both work all the time, and the first does all the harm that it can; how many of each one's
/// rounds were right.
fn beside_each_other(
    checks: &mut Checks,
    attached: &Attached,
    second: &Second,
    harm: &str,
) -> Result<[Result<u64>; 2]> {
    let guest = &attached.guest.agent;
    let [at_work, by_hand] = functions(guest)?;
    let device = pci::wait_block_device(guest, &at_work)?;
    let round = |number| steps::round_at(guest, (&device, WORK_OFFSET), (WORK_BYTES, number));
    let ((tried, second_ended), first_ended) = Rounds::beside(round, |first_rounds| {
        let round = |number| second.round(number);
        Rounds::beside(round, |second_rounds| {
            let both = Both {
                rounds: [first_rounds, second_rounds],
                second,
            };
            checks.check("both tenants' I/O goes on", || both.go_on());
            hostile_guest(checks, attached, &by_hand, &both)?;
            let hostile = Hostile {
                lending: &attached.lending,
                pair: &attached.pair,
                fdid: harm,
                both: &both,
            };
            hostile.tries(checks);
            Ok::<_, anyhow::Error>(())
        })
    });
    tried?;
    Ok([first_ended, second_ended])
}

/// The guest's own addresses of its functions: QEMU was told of the one for its work first.
fn functions(guest: &Agent) -> Result<[String; 2]> {
    let found = pci::find_nvmes(guest)?;
    found
        .try_into()
        .map_err(|found| anyhow!("the guest has {found:?} for two functions"))
}

/// Both tenants' checksummed I/O.
struct Both<'a> {
    rounds: [&'a Rounds; 2],
    second: &'a Second,
}

impl Both<'_> {
    /// Whole pieces of each from now on, and memory that is as it was.
    fn go_on(&self) -> Result<String> {
        let [first, second] = self.rounds.map(Rounds::go_on);
        self.second.look()?;
        Ok(format!("{} and {}", first?, second?))
    }
}

/// The first guest drives its function by hand.
fn hostile_guest(
    checks: &mut Checks,
    attached: &Attached,
    bdf: &str,
    both: &Both<'_>,
) -> Result<()> {
    let guest = &attached.guest.agent;
    guest.sh(&format!("echo {bdf} > /sys/bus/pci/drivers/nvme/unbind"))?;
    let window = pci::bar_address(&attached.pair.a.agent, NTB_BDF, 2)?;
    let second = both.second;
    for (what, direction, address) in [
        ("the second tenant's memory", "write", second.address),
        (
            "the second tenant's memory, reading",
            "read",
            second.address,
        ),
        ("the first byte past RAM", "write", RAM_BYTES),
        ("the window's far end", "write", window + WINDOW_FAR),
    ] {
        checks.check(&format!("a DMA to {what} is refused"), || {
            let line = refused(attached, bdf, direction, address)?;
            both.go_on()?;
            Ok(line)
        });
    }
    checks.check("the second tenant's memory is as it was", || {
        let blamed = faults_seen(attached, &second.fdid)?;
        ensure!(
            blamed == 0,
            "{blamed} of the first tenant's faults are told of the second"
        );
        both.go_on()
    });
    checks.must("after a reset that function's I/O is right as well", || {
        guest.sh(&format!(
            "echo 1 > /sys/bus/pci/devices/{bdf}/reset; echo {bdf} > /sys/bus/pci/drivers/nvme/bind"
        ))?;
        let device = pci::wait_block_device(guest, bdf)?;
        steps::round_at(guest, (&device, 0), (BYTES, 1))
    })?;
    Ok(())
}

/// The first tenant's VMM, and the other host, say what nobody says.
struct Hostile<'a> {
    lending: &'a Lending,
    pair: &'a Pair,
    fdid: &'a str,
    both: &'a Both<'a>,
}

impl Hostile<'_> {
    fn tries(&self, checks: &mut Checks) {
        checks.check("BAR accesses beyond its function give it nothing", || {
            let report = self.client("beyond")?;
            self.both.go_on()?;
            Ok(report)
        });
        for (case, words) in [
            ("short", "bytes"),
            ("reserved", "cannot map those addresses"),
            ("file", "memfd"),
        ] {
            let what = format!("foreign memory (`{case}`) is refused and told of its lease alone");
            checks.check(&what, || self.told(case, words));
        }
        checks.check(
            "a storm of interrupts is held back and told of its lease alone",
            || self.storm(),
        );
        checks.check("mailbox messages that host a forges are told", || {
            self.forged()
        });
        checks.check(
            "those that host b forges are told at the lease that they name alone",
            || self.forged_of_a_lease(),
        );
        checks.check("the harmful VMM's next one is served", || {
            self.client("good")
        });
    }

    fn client(&self, case: &str) -> Result<String> {
        let argv = ["lab-agent", "vfio-user", HARMFUL.socket, case];
        self.pair.b.agent.run(&argv)
    }

    /// What `status` tells of its lease, and that it tells nothing of any other.
    fn last_error(&self, status: &Value) -> Result<String> {
        let borrowed = status["borrowed"].as_array().context("no leases")?;
        let told = |lease: &Value| lease["last_error"].as_str().unwrap_or_default().to_owned();
        let (mine, others): (Vec<_>, Vec<_>) = borrowed
            .iter()
            .partition(|lease| lease["fdid"] == self.fdid);
        let other = others.into_iter().find(|lease| !told(lease).is_empty());
        ensure!(other.is_none(), "another lease is told of: {other:?}");
        let mine = mine
            .first()
            .with_context(|| format!("no lease in {status}"))?;
        Ok(told(mine))
    }

    fn told(&self, case: &str, words: &str) -> Result<String> {
        self.client(case)?;
        let told = |status: &Value| {
            let error = self.last_error(status);
            error.is_err() || error.is_ok_and(|error| error.contains(words))
        };
        let status = self.lending.b.wait_status(words, TOLD_TIMEOUT, told)?;
        self.both.go_on()?;
        self.last_error(&status)
    }

    /// How often each lent function's vectors were over their rate: its own, and all others.
    fn held_back(&self, status: &Value) -> [u64; 2] {
        let lent = status["lent"].as_array().into_iter().flatten();
        lent.fold([0; 2], |mut sums, lent| {
            let vectors = lent["vectors"].as_array().into_iter().flatten();
            let limits = vectors.filter_map(|vector| vector["rate_limits"].as_u64());
            sums[usize::from(lent["fdid"] != self.fdid)] += limits.sum::<u64>();
            sums
        })
    }

    fn storm(&self) -> Result<String> {
        let (a, host_b) = (&self.lending.a, &self.pair.b.agent);
        let before = self.held_back(&a.status()?);
        let argv = ["lab-agent", "storm", HARMFUL.socket, STORM_STOP];
        let pid = host_b.spawn(&argv, STORM_LOG)?;
        let held_back = a.wait_status("storm that is held back", TOLD_TIMEOUT, |status| {
            self.held_back(status)[0] > before[0]
        });
        let beside = held_back.and_then(|_| self.both.go_on());
        host_b.sh(&format!("touch {STORM_STOP}"))?;
        let code = host_b.wait(pid, TOLD_TIMEOUT)?;
        let said = host_b.text(STORM_LOG)?;
        host_b.sh(&format!("rm {STORM_STOP} {STORM_LOG}"))?;
        ensure!(code == Some(0), "it ended with {code:?}: {said}");
        let beside = beside?;
        let [its, others] = self.held_back(&a.status()?);
        ensure!(others == before[1], "others were held back as well");
        Ok(format!("{its} times, {beside} beside it; {}", said.trim()))
    }

    /// Words of the slot in host B's mailbox, written through host A's window as its kernel or
    /// anybody there could: a damaged message, and one of another session.
    fn forged(&self) -> Result<String> {
        let slot = pci::bar_address(&self.pair.a.agent, NTB_BDF, 2)? + SLOT_OFFSET;
        for (counter, offsets) in [
            ("torn", &[SLOT_CRC][..]),
            ("foreign", &[SLOT_SESSION, SLOT_COMMIT]),
        ] {
            let before = self.lending.b.status()?["ports"][0]["mailbox"][counter].clone();
            let host_a = &self.pair.a.agent;
            for offset in offsets {
                flip(host_a, slot + offset)?;
            }
            self.lending
                .b
                .wait_status(counter, TOLD_TIMEOUT, |status| {
                    status["ports"][0]["mailbox"][counter].as_u64() > before.as_u64()
                })?;
            // As it was, so that the next is judged by itself.
            for offset in offsets {
                flip(host_a, slot + offset)?;
            }
        }
        let mailbox = self.lending.b.status()?["ports"][0]["mailbox"].clone();
        ensure!(mailbox["violations"] == 0, "{mailbox}");
        self.both.go_on()?;
        Ok(mailbox.to_string())
    }

    /// The same in host A's mailbox, where the last message is a request about a lease.
    fn forged_of_a_lease(&self) -> Result<String> {
        let (a, host_b) = (&self.lending.a, &self.pair.b.agent);
        let slot = pci::bar_address(host_b, NTB_BDF, 2)? + SLOT_OFFSET;
        let lease = u64::from(read(host_b, slot + SLOT_LEASE)?);
        let lease = Value::from(format!("{lease:016x}"));
        let of = |status: &Value, named: bool, counter: &str| {
            let lent = status["lent"].as_array().into_iter().flatten();
            let lent = lent.filter(|lent| (lent["lease"] == lease) == named);
            let count = |lent: &Value| lent["refused"][counter].as_u64();
            lent.map(count).sum::<Option<u64>>().unwrap_or_default()
        };
        for (counter, offsets) in [
            ("torn", &[SLOT_CRC][..]),
            ("foreign", &[SLOT_SESSION, SLOT_COMMIT]),
        ] {
            for offset in offsets {
                flip(host_b, slot + offset)?;
            }
            let told = |status: &Value| of(status, true, counter) > 0;
            let status = a.wait_status(counter, TOLD_TIMEOUT, told)?;
            ensure!(
                of(&status, false, counter) == 0,
                "another lease than {lease} is told of: {}",
                status["lent"]
            );
            for offset in offsets {
                flip(host_b, slot + offset)?;
            }
        }
        let status = a.status()?;
        let violations = &status["ports"][0]["mailbox"]["violations"];
        ensure!(*violations == 0, "{violations} violations");
        self.both.go_on()?;
        Ok(format!(
            "lease {lease}: torn {}, foreign {}",
            of(&status, true, "torn"),
            of(&status, true, "foreign")
        ))
    }
}

fn read(host: &Agent, address: u64) -> Result<u32> {
    let word = host.run(&["lab-agent", "devmem", "read", &address.to_string(), "4"])?;
    u32::from_str_radix(word.trim(), 16).context("no hex word")
}

/// One bit of a word that a host reaches through its window.
fn flip(host: &Agent, address: u64) -> Result<()> {
    let flipped = (read(host, address)? ^ 1).to_string();
    let at = address.to_string();
    let argv = ["lab-agent", "devmem", "write", &at, &flipped];
    host.run(&argv).map(drop)
}
