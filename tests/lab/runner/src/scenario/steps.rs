//! Steps that several scenarios share: from two hosts to a guest with a borrowed function, and back.

use super::third;
use crate::agent::Agent;
use crate::check::Checks;
use crate::guest::{Guest, GuestSpec};
use crate::lab::{Lab, Pair};
use crate::ntb::Ntb;
use crate::pci;
use crate::snapshot::Snapshot;
use crate::sublet::{Lending, Workers};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::Duration;

/// Where the worker's socket lies on host B.
pub const SOCKET: &str = "/run/sublet/vf.sock";
/// How many checks [`attach`] makes.
pub const ATTACH_CHECKS: usize = 5;
/// How many [`detach`] makes.
pub const DETACH_CHECKS: usize = 2;

/// Writes without end, a line for each.
pub const ENDLESS_IO: &str = "while lab-agent dio write /dev/nvme0n1 1048576 65536 7; do :; done";
/// Folders that a killed port leaves behind, empty: else they stay, and are seen.
pub const FOLDERS_GO: &str =
    "rmdir /run/sublet/ports/* /run/sublet/ports /run/sublet 2>/dev/null || :";

const IO_LOG: &str = "/tmp/io";
const DEVICE: &str = "/dev/nvme0n1";
/// Somewhere behind the first blocks, which a kernel reads for partitions.
const OFFSET: u64 = 1 << 20;
/// The namespace of a guest's only function, and where nothing else is written.
pub const BLOCKS: (&str, u64) = (DEVICE, OFFSET);
const SEED: u64 = 20;
/// A trapped window takes 512 accesses for a page: 1 MiB is written in 6 to 8 s on an idle machine.
const DIO_TIMEOUT: Duration = Duration::from_secs(300);
const APPEAR_TIMEOUT: Duration = Duration::from_secs(60);
/// A port that a busy machine keeps from answering is told without what it has borrowed.
const WORKER_TIMEOUT: Duration = Duration::from_secs(20);

/// Two hosts, a lease, and a guest that uses the function.
pub struct Attached {
    /// The guest.
    pub guest: Guest,
    /// Both daemons.
    pub lending: Lending,
    /// The function.
    pub fdid: String,
    /// Before the daemons were started.
    pub before: (Snapshot, Snapshot),
    /// With daemons, before the function was borrowed.
    pub idle: (Snapshot, Snapshot),
    /// Both hosts.
    pub pair: Pair,
}

/// What scenarios do differently on their way to an attached guest.
#[derive(Default)]
pub struct Setup<'a> {
    /// Options of the NTB model.
    pub model: &'a [&'a str],
    /// Flags of `sublet borrow`.
    pub borrow: &'a [&'a str],
    /// How many VFs the guest's own is followed by.
    pub more_vfs: u32,
    /// How the daemons serve VMMs.
    pub workers: Workers,
    /// Makes other configurations of the samples.
    pub config: Option<fn(&str) -> String>,
    /// Comes before the guest boots: what else it is to have.
    pub before_boot: Option<&'a BeforeBoot<'a>>,
    /// A cable of host A to a third host, which the scenario starts by itself.
    pub second: Option<&'a Ntb>,
}

type BeforeBoot<'a> = dyn Fn(&Pair, &Lending) -> Result<()> + 'a;

/// Goes all the way to a guest whose driver has found its namespace.
pub fn attach(
    lab: &Lab,
    checks: &mut Checks,
    setup: &Setup<'_>,
    spec: GuestSpec,
) -> Result<Attached> {
    let ntb = lab.ntb(setup.model)?;
    let [mut a, b] = lab.pair_specs(Some(&ntb))?;
    if let Some(second) = setup.second {
        a = third::plugged(a, second);
    }
    let mut pair = None;
    checks.must("both hosts boot", || {
        pair = Some(lab.boot(&a, &b, Some(ntb))?);
        Ok("")
    })?;
    let pair = pair.context("no hosts")?;
    pci::wait_namespace(&pair.a.agent)?;
    let before = pair.snapshot()?;
    let mut lending = None;
    checks.must("both daemons agree on a session", || {
        let how = (setup.more_vfs, setup.workers);
        let config = |text: &str| {
            let edited = setup.config.map(|edit| edit(text));
            edited.unwrap_or_else(|| text.to_owned())
        };
        let started = Lending::start_with(lab, &pair, (2, 1), how, config)?;
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
        let told = lending.borrow(&fdid, SOCKET, setup.borrow)?;
        if setup.workers != Workers::Threads {
            // No VMM has been started: it has not read a byte of one.
            let mapped = setup.borrow.contains(&"mapped");
            ensure_worker_has_no_door(&pair.b.agent, &lending, mapped)?;
        }
        Ok(told)
    })?;
    let mut guest = None;
    checks.must("a guest with the stock driver finds its namespace", || {
        setup
            .before_boot
            .map_or(Ok(()), |act| act(&pair, &lending))?;
        guest = Some(boot(lab, &pair, spec)?);
        Ok("")
    })?;
    Ok(Attached {
        guest: guest.context("no guest")?,
        lending,
        fdid,
        before,
        idle,
        pair,
    })
}

/// Host B's worker has no group and no container of VFIO open, and no device either, but for the
/// window where its VMM is to map that itself. How many devices it has.
pub fn ensure_worker_has_no_door(host: &Agent, lending: &Lending, mapped: bool) -> Result<usize> {
    let pid = |status: &Value| status["borrowed"][0]["worker"]["pid"].as_u64();
    let has_one = |status: &Value| pid(status).is_some();
    let status = lending.b.wait_status("worker", WORKER_TIMEOUT, has_one)?;
    let pid = pid(&status).context("no worker")?;
    let listed = host.sh(&format!("ls -l /proc/{pid}/fd"))?;
    let links = listed.lines().filter_map(|line| line.split_once(" -> "));
    let links: Vec<&str> = links.map(|(_, target)| target).collect();
    ensure!(!links.is_empty(), "process {pid} has nothing: {listed}");
    // A socket's link is its number, whatever it was named; a device's is `anon_inode:[vfio-device]`.
    let of_vfio = |link: &&&str| link.contains("vfio");
    let doors: Vec<&&str> = links.iter().filter(of_vfio).collect();
    let devices = doors.iter().filter(|door| door.contains("[vfio-device]"));
    let (devices, wanted) = (devices.count(), usize::from(mapped));
    ensure!(
        (doors.len(), devices) == (wanted, wanted),
        "the worker has {doors:?} of VFIO open"
    );
    Ok(devices)
}

/// Goes all the way back and looks at what is left behind.
pub fn detach(checks: &mut Checks, attached: Attached) -> Result<()> {
    detach_with(checks, attached, |_, _| Ok(()))
}

/// The same; what else the guest had is given back behind its end.
pub fn detach_with(
    checks: &mut Checks,
    attached: Attached,
    give_back: impl FnOnce(&Pair, &Lending) -> Result<()>,
) -> Result<()> {
    let Attached {
        guest,
        lending,
        fdid,
        before,
        idle,
        pair,
    } = attached;
    checks.check(
        "the function is returned and nothing of the lease is left",
        || {
            guest.shut_down()?;
            lending.b.verb(&["return", &fdid])?;
            give_back(&pair, &lending)?;
            pair.ensure_unchanged(&idle)
        },
    );
    checks.check("both hosts are as before", || {
        lending.end(&pair)?;
        pair.ensure_unchanged(&before)
    });
    Ok(())
}

/// Waits until the stock driver has found the namespace.
pub fn wait_namespace(agent: &Agent) -> Result<()> {
    agent
        .wait_until(&format!("test -b {DEVICE}"), APPEAR_TIMEOUT)
        .map(drop)
}

/// Direct I/O on the namespace, in a guest or on host A; the SHA-256 of what went through.
pub fn dio(agent: &Agent, direction: &str, bytes: u64, seed: Option<u64>) -> Result<String> {
    dio_at(agent, direction, BLOCKS, (bytes, seed))
}

/// The same of any device, somewhere on it.
fn dio_at(
    agent: &Agent,
    direction: &str,
    (device, offset): (&str, u64),
    (bytes, seed): (u64, Option<u64>),
) -> Result<String> {
    let numbers = [Some(offset), Some(bytes), seed].map(|number| number.map(|n| n.to_string()));
    let mut argv = vec!["lab-agent", "dio", direction, device];
    argv.extend(numbers.iter().flatten().map(String::as_str));
    let answer: Value = serde_json::from_str(&agent.run_within(&argv, DIO_TIMEOUT)?)?;
    Ok(answer["sha256"].as_str().context("no checksum")?.to_owned())
}

/// Writes, reads the same blocks, and gives the checksum of both back.
pub fn write_and_read_back(agent: &Agent, bytes: u64) -> Result<String> {
    round_at(agent, BLOCKS, (bytes, SEED))
}

/// The same of any device, somewhere on it, with bytes that follow from the seed.
pub fn round_at(agent: &Agent, at: (&str, u64), (bytes, seed): (u64, u64)) -> Result<String> {
    let written = dio_at(agent, "write", at, (bytes, Some(seed)))?;
    let read = dio_at(agent, "read", at, (bytes, None))?;
    ensure!(written == read, "wrote {written}, read {read}");
    Ok(written)
}

/// A guest on the borrowed function: boots, finds its namespace.
pub fn boot(lab: &Lab, pair: &Pair, spec: GuestSpec) -> Result<Guest> {
    let guest = lab.boot_guest(&spec.device(SOCKET), &pair.b)?;
    wait_namespace(&guest.agent)?;
    Ok(guest)
}

/// Writes in the background until a write fails; returns after the first. Without flushes: Linux
/// 7.3.4 stands still for ever where the request that times out is one. Its `blk_mq_timeout_work`
/// holds a reference on the flush and calls `nvme_timeout`, and that waits (in
/// `blk_mq_tagset_wait_completed_request`) for the flush to be over, which takes its last reference.
pub fn at_work(guest: &Agent) -> Result<u32> {
    guest.sh("echo 'write through' > /sys/block/nvme0n1/queue/write_cache")?;
    let io = guest.spawn(&["sh", "-c", ENDLESS_IO], IO_LOG)?;
    guest.wait_until(&format!("test -s {IO_LOG}"), APPEAR_TIMEOUT)?;
    Ok(io)
}
