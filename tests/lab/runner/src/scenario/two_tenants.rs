//! Scenario `two-tenants`: two tenants behind one port, each with a VF of its own; what the first one's guest tries, its VMM and the other host reaches nothing of the second's.

use super::isolation::{faults_seen, refused};
use super::steps::{self, ATTACH_CHECKS, Attached, DETACH_CHECKS, SOCKET, Setup};
use super::tenant::Neighbour;
use super::{Scenario, When};
use crate::agent::Agent;
use crate::check::Checks;
use crate::guest::GuestSpec;
use crate::host::NTB_BDF;
use crate::lab::{Lab, Pair};
use crate::pci;
use crate::sublet::{Lending, Workers};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::Duration;

/// One port, two tenants, and everybody but the second is hostile.
pub const SCENARIO: Scenario = Scenario {
    name: "two-tenants",
    checks: ATTACH_CHECKS + 16 + DETACH_CHECKS,
    when: When::Full,
    own_model: None,
    deadline: Duration::from_secs(1200),
    run,
};

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

fn spec(lab: &Lab, name: &str) -> Result<GuestSpec> {
    let mut spec = GuestSpec::stock(name, &lab.vmm()?);
    // One hugepage for the queues of the guest's own tool.
    spec.cmdline = "hugepages=1 iomem=relaxed".to_owned();
    Ok(spec)
}

fn run(lab: &Lab, checks: &mut Checks) -> Result<()> {
    let setup = Setup {
        more_vfs: 1,
        workers: Workers::Processes,
        ..Setup::default()
    };
    let attached = steps::attach(lab, checks, &setup, spec(lab, "g")?)?;
    let mut second = None;
    checks.must(
        "a second tenant works with a VF behind the same port",
        || {
            let moved_in = Neighbour::move_in(&attached)?;
            let fdid = moved_in.fdid.clone();
            second = Some(moved_in);
            Ok(fdid)
        },
    )?;
    let second = second.context("no second tenant")?;
    checks.check("both tenants' I/O is right", || {
        let written = steps::write_and_read_back(&attached.guest.agent, 64 << 10)?;
        second.goes_on()?;
        Ok(written)
    });
    hostile_guest(checks, &attached, &second)?;
    let Attached {
        guest,
        lending,
        fdid,
        before,
        idle,
        pair,
    } = attached;
    guest.shut_down()?;
    let hostile = Hostile {
        lending: &lending,
        pair: &pair,
        fdid: &fdid,
        second: &second,
    };
    hostile.tries(checks);
    let mut again = None;
    checks.must(
        "the first tenant's next guest works as if nothing was",
        || {
            let guest = steps::boot(lab, &pair, spec(lab, "g2")?)?;
            let written = steps::write_and_read_back(&guest.agent, 64 << 10)?;
            again = Some(guest);
            Ok(written)
        },
    )?;
    let attached = Attached {
        guest: again.context("no guest")?,
        lending,
        fdid,
        before,
        idle,
        pair,
    };
    checks.check("every byte of the second tenant was right", || {
        second.move_out(&attached)
    });
    steps::detach(checks, attached)
}

/// The first guest drives its function by hand.
fn hostile_guest(checks: &mut Checks, attached: &Attached, second: &Neighbour) -> Result<()> {
    let guest = &attached.guest.agent;
    let bdf = pci::find_nvme(guest)?;
    guest.sh(&format!("echo {bdf} > /sys/bus/pci/drivers/nvme/unbind"))?;
    let window = pci::bar_address(&attached.pair.a.agent, NTB_BDF, 2)?;
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
            let line = refused(attached, &bdf, direction, address)?;
            second.goes_on()?;
            Ok(line)
        });
    }
    checks.check("the second tenant's memory is as it was", || {
        let blamed = faults_seen(attached, &second.fdid)?;
        ensure!(
            blamed == 0,
            "{blamed} of the first tenant's faults are told of the second"
        );
        second.goes_on().map(|()| "")
    });
    checks.must("after a reset the first guest's I/O is right again", || {
        guest.sh(&format!(
            "echo 1 > /sys/bus/pci/devices/{bdf}/reset; echo {bdf} > /sys/bus/pci/drivers/nvme/bind"
        ))?;
        steps::wait_namespace(guest)?;
        steps::write_and_read_back(guest, 64 << 10)
    })?;
    Ok(())
}

/// The first tenant's VMM, and the other host, say what nobody says.
struct Hostile<'a> {
    lending: &'a Lending,
    pair: &'a Pair,
    fdid: &'a str,
    second: &'a Neighbour,
}

impl Hostile<'_> {
    fn tries(&self, checks: &mut Checks) {
        checks.check("BAR accesses beyond its function give it nothing", || {
            let argv = ["lab-agent", "vfio-user", SOCKET, "beyond"];
            let report = self.pair.b.agent.run(&argv)?;
            self.second.goes_on()?;
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
        checks.check("mailbox messages that host a forges are told", || {
            self.forged()
        });
        checks.check(
            "those that host b forges are told at the lease that they name alone",
            || self.forged_of_a_lease(),
        );
    }

    /// What `status` tells of a lease.
    fn last_error(status: &Value, fdid: &str) -> Result<String> {
        let borrowed = status["borrowed"].as_array().context("no leases")?;
        let lease = borrowed.iter().find(|lease| lease["fdid"] == fdid);
        let lease = lease.with_context(|| format!("no lease of {fdid} in {status}"))?;
        Ok(lease["last_error"].as_str().unwrap_or_default().to_owned())
    }

    fn told(&self, case: &str, words: &str) -> Result<String> {
        let argv = ["lab-agent", "vfio-user", SOCKET, case];
        self.pair.b.agent.run(&argv)?;
        let told = |status: &Value| {
            Self::last_error(status, self.fdid).is_ok_and(|error| error.contains(words))
        };
        let status = self.lending.b.wait_status(words, TOLD_TIMEOUT, told)?;
        let other = Self::last_error(&status, &self.second.fdid)?;
        ensure!(other.is_empty(), "the second lease is told of: {other}");
        self.second.goes_on()?;
        Self::last_error(&status, self.fdid)
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
        self.second.goes_on()?;
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
        self.second.goes_on()?;
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
