//! Scenario `two-tenants`: two guests behind one port, each with a VF of its own; what the first tries, its VMM and the other host reaches nothing of the second's.

use super::isolation::refused;
use super::steps::{self, ATTACH_CHECKS, Attached, DETACH_CHECKS, SOCKET, Setup};
use super::{Scenario, When};
use crate::agent::Agent;
use crate::check::Checks;
use crate::guest::{Guest, GuestSpec};
use crate::host::NTB_BDF;
use crate::lab::{Lab, Pair};
use crate::pci;
use crate::sublet::{Lending, Workers};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::Duration;

/// One port, two guests, and everybody but the second is hostile.
pub const SCENARIO: Scenario = Scenario {
    name: "two-tenants",
    checks: ATTACH_CHECKS + 16 + DETACH_CHECKS,
    when: When::Full,
    own_model: None,
    deadline: Duration::from_secs(1200),
    run,
};

const MIB: u64 = 1 << 20;
/// The guests' RAM; their kernels are told of one MiB less and so never use the last page.
const RAM_BYTES: u64 = 128 * MIB;
const LAST_PAGE: u64 = RAM_BYTES - 4096;
/// RAM slices begin where their guest-physical address does, modulo this.
const STEP: u64 = 2 * MIB;
const WINDOW_BYTES: u64 = 1 << 30;
/// Bytes of the window that no guest can have been given: its far end.
const WINDOW_FAR: u64 = 900 * MIB;
/// What the second guest's last page holds.
const PATTERN: u32 = 0x7e4a_47b2;
/// The VF after the first guest's.
const SECOND_BDF: &str = "0000:01:00.2";
const SECOND_CONTROLLER: u32 = 2;
const SECOND_SOCKET: &str = "/run/sublet/second.sock";
/// PROTOCOL.md: where the slot lies in the mailbox; its session, checksum, a request's lease, and
/// the commit word in it.
const SLOT_OFFSET: u64 = 0x1000;
const SLOT_SESSION: u64 = 0;
const SLOT_CRC: u64 = 32;
const SLOT_LEASE: u64 = 48;
const SLOT_COMMIT: u64 = 4088;
const STOP: &str = "/run/io.stop";
const LOG: &str = "/run/io.log";
/// Pieces that are written with another content each time, read back and compared; behind what
/// the first guest uses of the namespace, which both have.
const WITNESS: &str = "i=0
sum() { lab-agent dio \"$@\" | sed 's/.*\"sha256\":\"//;s/\".*//'; }
while [ ! -e /run/io.stop ]; do
  i=$((i + 1))
  w=$(sum write /dev/nvme0n1 33554432 16384 $i)
  r=$(sum read /dev/nvme0n1 33554432 16384)
  if [ -n \"$w\" ] && [ \"$w\" = \"$r\" ]; then echo right; else echo wrong $i $w $r; fi
done";
/// A piece takes well under a second on an idle machine.
const PIECES_TIMEOUT: Duration = Duration::from_secs(120);
const TOLD_TIMEOUT: Duration = Duration::from_secs(20);

fn spec(lab: &Lab, name: &str) -> Result<GuestSpec> {
    let mut spec = GuestSpec::stock(name, &lab.vmm()?);
    // One hugepage for the queues of the guest's own tool.
    spec.cmdline = format!("mem={}M hugepages=1 iomem=relaxed", RAM_BYTES / MIB - 1);
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
    checks.must("a second guest has a VF behind the same port", || {
        let moved_in = Second::move_in(lab, &attached)?;
        let fdid = moved_in.fdid.clone();
        second = Some(moved_in);
        Ok(fdid)
    })?;
    let second = second.context("no second guest")?;
    checks.check("both guests' I/O is right", || {
        let written = steps::write_and_read_back(&attached.guest.agent, 64 << 10)?;
        second.goes_on(2)?;
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
    checks.check("every byte of the second guest was right", || {
        second.move_out(&attached)
    });
    steps::detach(checks, attached)
}

/// The first guest drives its function by hand.
fn hostile_guest(checks: &mut Checks, attached: &Attached, second: &Second) -> Result<()> {
    let guest = &attached.guest.agent;
    let bdf = pci::find_nvme(guest)?;
    guest.sh(&format!("echo {bdf} > /sys/bus/pci/drivers/nvme/unbind"))?;
    let window = pci::bar_address(&attached.pair.a.agent, NTB_BDF, 2)?;
    for (what, direction, address) in [
        ("the second guest's memory", "write", second.page),
        ("the second guest's memory, reading", "read", second.page),
        ("the first byte past RAM", "write", RAM_BYTES),
        ("the window's far end", "write", window + WINDOW_FAR),
    ] {
        checks.check(&format!("a DMA to {what} is refused"), || {
            let line = refused(attached, &bdf, direction, address)?;
            second.goes_on(1)?;
            Ok(line)
        });
    }
    checks.check("the second guest's page is as it was", || {
        second.page_is_untouched()
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

/// The second guest, at work all the time.
struct Second {
    guest: Guest,
    fdid: String,
    witness: u32,
    /// Where host A's outbound window leads to its last page.
    page: u64,
}

impl Second {
    fn move_in(lab: &Lab, attached: &Attached) -> Result<Self> {
        let (a, b) = (&attached.pair.a.agent, &attached.pair.b);
        pci::nvme_online(a, SECOND_CONTROLLER, 2, 1)?;
        pci::bind(a, SECOND_BDF, "vfio-pci")?;
        let fdid = attached.lending.offer_function(SECOND_BDF)?;
        attached.lending.borrow(&fdid, SECOND_SOCKET, &[])?;
        let guest = lab.boot_guest(&spec(lab, "h")?.device(SECOND_SOCKET), b)?;
        steps::wait_namespace(&guest.agent)?;
        let (at, value) = (LAST_PAGE.to_string(), PATTERN.to_string());
        guest
            .agent
            .run(&["lab-agent", "devmem", "write", &at, &value])?;
        let page = find(attached)?;
        let witness = guest.agent.spawn(&["sh", "-c", WITNESS], LOG)?;
        Ok(Second {
            guest,
            fdid,
            witness,
            page,
        })
    }

    /// How many pieces came back right; none may have come back wrong.
    fn pieces(&self) -> Result<u64> {
        let log = self.guest.agent.text(LOG)?;
        ensure!(
            log.lines().all(|line| line == "right"),
            "the second guest's bytes: {log}"
        );
        Ok(log.lines().count() as u64)
    }

    /// As many more come back right from now on.
    fn goes_on(&self, pieces: u64) -> Result<()> {
        let most = self.pieces()? + pieces;
        let script = format!("test $(wc -l < {LOG}) -ge {most}");
        self.guest.agent.wait_until(&script, PIECES_TIMEOUT)?;
        self.pieces().map(drop)
    }

    fn page_is_untouched(&self) -> Result<String> {
        let at = LAST_PAGE.to_string();
        let read = self
            .guest
            .agent
            .run(&["lab-agent", "devmem", "read", &at, "4"])?;
        ensure!(
            read == format!("{PATTERN:08x}"),
            "the second guest's page reads {read}"
        );
        Ok(read)
    }

    /// Ends its work and its lease; as before [`Second::move_in`].
    fn move_out(self, attached: &Attached) -> Result<String> {
        let a = &attached.pair.a.agent;
        self.page_is_untouched()?;
        self.guest.agent.sh(&format!("touch {STOP}"))?;
        let code = self.guest.agent.wait(self.witness, PIECES_TIMEOUT)?;
        ensure!(code == Some(0), "its work ended with {code:?}");
        let pieces = self.pieces()?;
        self.guest.shut_down()?;
        attached.lending.b.verb(&["return", &self.fdid])?;
        attached.lending.a.verb(&["unavailable", SECOND_BDF])?;
        attached.lending.a.verb(&["remove", SECOND_BDF])?;
        pci::unbind(a, SECOND_BDF)?;
        pci::nvme_offline(a, SECOND_CONTROLLER)?;
        Ok(format!("{pieces} pieces of 16 KiB"))
    }
}

/// The pattern, seen by host A through its window: the NTB does lead there.
fn find(attached: &Attached) -> Result<u64> {
    let host_a = &attached.pair.a.agent;
    let window = pci::bar_address(host_a, NTB_BDF, 2)?;
    let first = window + LAST_PAGE % STEP;
    let steps = WINDOW_BYTES / STEP;
    let found = host_a.sh(&format!(
        "i=0; while [ $i -lt {steps} ]; do at=$(({first} + i * {STEP})); \
         if [ \"$(lab-agent devmem read $at 4)\" = {PATTERN:08x} ]; then echo $at; exit; fi; \
         i=$((i + 1)); done"
    ))?;
    let found = found.trim().parse();
    found.context("host a does not see the second guest's memory through its window")
}

/// The first tenant's VMM, and the other host, say what nobody says.
struct Hostile<'a> {
    lending: &'a Lending,
    pair: &'a Pair,
    fdid: &'a str,
    second: &'a Second,
}

impl Hostile<'_> {
    fn tries(&self, checks: &mut Checks) {
        checks.check("BAR accesses beyond its function give it nothing", || {
            let argv = ["lab-agent", "vfio-user", SOCKET, "beyond"];
            let report = self.pair.b.agent.run(&argv)?;
            self.second.goes_on(1)?;
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
        self.second.goes_on(1)?;
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
        self.second.goes_on(1)?;
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
        self.second.goes_on(1)?;
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
