//! The verbs on two hosts of one process, joined by a soft NTB: every refusal in its words, and nothing left of it.

use super::*;
use crate::daemon::vocabulary::{Availability, BarMode, BdfText, FdidText, Hex64, PortQuarantine};
use crate::pool::{
    Cause, Change, FunctionKey, Holder, JournalEntry, LeaseRecord, LeaseStore, Move,
};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use vfio_shim::model::{Function, FunctionIds};
use vfio_shim::ntb::soft::{SoftFunction, SoftLink, SoftPort, SoftPortConfig};
use vfio_shim::path::{PoolEntry, PoolState};

const WINDOW_BYTES: u64 = 64 << 20;
/// PROTOCOL.md, scratchpads: what a peer posts that speaks versions 7 to 9, in its order.
const FOREIGN_POST: [(u32, u32); 7] = [
    (5, 0),
    (0, 0x1234_5678),
    (1, 0),
    (2, 0),
    (3, 0),
    (4, 9 << 16 | 7),
    (5, !(9 << 16 | 7)),
];
const PATIENCE: Duration = Duration::from_secs(20);
pub(super) const VF: &str = "0000:01:00.1";
const NTB: &str = "0000:02:00.0";

pub(super) fn bdf(text: &str) -> Bdf {
    text.parse().unwrap()
}

pub(super) fn fdid(text: &str) -> FdidText {
    text.parse::<Fdid>().unwrap().into()
}

pub(super) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(Instant::now() < deadline, "{what} did not come true");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Node 4 lends to node 8; sysfs is a directory of node 4's.
pub(super) struct Rig {
    pub(super) hosts: [LocalHost; 2],
    pub(super) link: SoftLink,
    pub(super) function: Arc<SoftFunction>,
    dir: tempfile::TempDir,
    state: tempfile::TempDir,
}

fn config(node: u16, dir: &Path, state: &Path) -> Config {
    let text = format!(
        r#"
        [node]
        id = {node}
        name = "n{node}"
        [daemon]
        control = "{dir}/control.sock"
        sockets = "{dir}"
        state = "{state}/{node}"
        [[port]]
        name = "ntb0"
        bdf = "{NTB}"
        peers = "cable"
        trust_domain = "lab"
        trust_vmm = {trust}
        heartbeat_ms = 10
        lost_after_ms = 10000
        [policy]
        allow = ["0000:01:00.*", "{NTB}"]
        "#,
        dir = dir.display(),
        state = state.display(),
        trust = node == 8,
    );
    Config::parse(Path::new("test.toml"), &text).unwrap()
}

fn host(config: &Config, port: Arc<SoftPort>, sysfs: &Path) -> LocalHost {
    let machine = Machine {
        ports: vec![port],
        functions: Arc::new(KernelFunctions::new(Sysfs::new(sysfs), None, None)),
    };
    LocalHost::new(config, machine, Workers::Threads).unwrap()
}

impl Rig {
    pub(super) fn new() -> Self {
        Self::on(tempfile::tempdir().unwrap())
    }

    /// With what earlier daemons have left in their stores.
    fn on(state: tempfile::TempDir) -> Self {
        let rig = Self::apart(state);
        let ids = FunctionIds {
            vendor: 0x5b1e,
            device: 1,
            ..FunctionIds::default()
        };
        let entry = PoolEntry {
            bdf: bdf(VF),
            ids,
            state: PoolState::Available,
            irq_count: 4,
            bar_bytes: 8192,
            serial: 0,
        };
        let offered: Arc<dyn Function> = rig.function.clone();
        rig.hosts[0].ports[0].engine.offer(entry, offered).unwrap();
        rig.wait_session();
        rig
    }

    fn wait_session(&self) {
        let open = |host: &LocalHost| host.ports[0].peer_node().is_some();
        until("a session", || self.hosts.iter().all(open).then_some(()));
    }

    /// Both hosts, and nothing offered.
    fn apart(state: tempfile::TempDir) -> Self {
        let port = SoftPortConfig {
            window_bytes: [WINDOW_BYTES; 2],
        };
        let link = SoftLink::new([port; 2]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let sysfs = dir.path().join("sys");
        let hosts = [(4, 0), (8, 1)].map(|(node, side)| {
            let config = config(node, dir.path(), state.path());
            host(&config, link.port(side), &sysfs)
        });
        let function = Arc::new(SoftFunction::new(FunctionIds::default(), 4));
        Self {
            hosts,
            link,
            function,
            dir,
            state,
        }
    }

    fn lends(&self, bdf: &str) -> VerbError {
        let bdf = BdfText::from(super::tests::bdf(bdf));
        let refusal = self.hosts[0].handle(Verb::Add { bdf }).unwrap_err();
        assert!(self.hosts[0].state().lent.is_empty());
        refusal
    }

    pub(super) fn borrow(&self, change: impl FnOnce(&mut Borrow)) -> Result<Outcome, VerbError> {
        let mut borrow = Borrow {
            fdid: "40101".to_owned(),
            ram: None,
            bars: None,
            trust_vmm: false,
            trust_domain: None,
        };
        change(&mut borrow);
        self.hosts[1].handle(Verb::Borrow {
            fdid: fdid(&borrow.fdid),
            socket: PathBuf::from("vf.sock"),
            ram: borrow.ram,
            bars: borrow.bars,
            trust_vmm: borrow.trust_vmm,
            trust_domain: borrow.trust_domain,
        })
    }

    /// All that a refused verb must leave as it was.
    fn left(&self) -> Left {
        let status = |side: usize| self.hosts[side].ports[0].engine.status().unwrap();
        let (held, claims) = {
            let state = self.hosts[1].state();
            (state.borrowed.len(), state.claims.is_empty())
        };
        Left {
            maps: [
                self.link.port(0).space().maps().len(),
                self.link.port(1).space().maps().len(),
                self.function.space().maps().len(),
            ],
            free: [0, 1].map(|side| status(side).window_free),
            leases: held + status(1).borrowed.len(),
            claims,
            offers: status(0)
                .lent
                .iter()
                .map(|l| l.offer.state.word())
                .collect(),
            triggers: self.function.triggers(),
            files: files(self.dir.path()),
        }
    }

    fn refused(&self, code: ErrorCode, text: &str, change: impl FnOnce(&mut Borrow)) {
        let before = self.left();
        let refusal = self.borrow(change).unwrap_err();
        assert_eq!(refusal, VerbError::new(code, text));
        // A lease that the lender gave goes back by a message of its own.
        until("all is as before", || (self.left() == before).then_some(()));
    }

    fn file(&self, bdf: &str, name: &str) -> PathBuf {
        self.dir
            .path()
            .join("sys/bus/pci/devices")
            .join(bdf)
            .join(name)
    }

    fn function(&self, bdf: &str, group: u32, driver: Option<&str>) {
        let sys = self.dir.path().join("sys");
        let group = sys.join(format!("kernel/iommu_groups/{group}"));
        fs::create_dir_all(group.join("devices").join(bdf)).unwrap();
        fs::create_dir_all(self.file(bdf, "")).unwrap();
        fs::write(self.file(bdf, "reset_method"), "flr\n").unwrap();
        symlink(group, self.file(bdf, "iommu_group")).unwrap();
        if let Some(driver) = driver {
            let driver = sys.join("bus/pci/drivers").join(driver);
            symlink(driver, self.file(bdf, "driver")).unwrap();
        }
    }
}

impl Drop for Rig {
    /// As the daemon ends: else workers would outlive their hosts.
    fn drop(&mut self) {
        self.link.host(1).thaw();
        self.hosts[1].stop();
        self.hosts[0].stop();
    }
}

pub(super) struct Borrow {
    fdid: String,
    ram: Option<u64>,
    bars: Option<BarMode>,
    trust_vmm: bool,
    trust_domain: Option<String>,
}

#[derive(Debug, PartialEq)]
struct Left {
    maps: [usize; 3],
    free: [u64; 2],
    leases: usize,
    claims: bool,
    offers: Vec<&'static str>,
    triggers: usize,
    files: BTreeMap<PathBuf, Option<String>>,
}

/// Every file below a directory, and what it holds; links are not followed.
fn files(dir: &Path) -> BTreeMap<PathBuf, Option<String>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            found.extend(files(&path));
        }
        let text = fs::read_to_string(&path).ok();
        found.insert(path, text);
    }
    found
}

#[test]
fn functions_that_cannot_be_lent_are_refused_in_words_and_left_alone() {
    let rig = Rig::apart(tempfile::tempdir().unwrap());
    rig.wait_session();
    let refused = |bdf: &str, code: ErrorCode, text: &str| {
        let before = rig.left();
        assert_eq!(rig.lends(bdf), VerbError::new(code, text));
        assert_eq!(rig.left(), before);
    };
    refused(
        "0000:01:00.7",
        ErrorCode::UnknownFunction,
        "there is no PCI function 0000:01:00.7 on this host: look with lspci -D",
    );
    rig.function("0000:00:08.0", 1, None);
    refused(
        "0000:00:08.0",
        ErrorCode::NotAllowed,
        "policy.allow in the configuration does not name 0000:00:08.0: add it there, and restart \
         the daemon",
    );
    rig.function(NTB, 2, Some("vfio-pci"));
    refused(
        NTB,
        ErrorCode::NotAllowed,
        "0000:02:00.0 is the NTB of port `ntb0`: it cannot be lent",
    );
    rig.function("0000:01:00.0", 3, Some("nvme"));
    refused(
        "0000:01:00.0",
        ErrorCode::DriverBound,
        "0000:01:00.0 is driven by nvme on this host: stop what uses it, then unbind it: echo \
         0000:01:00.0 > /sys/bus/pci/drivers/nvme/unbind",
    );
    fs::write(rig.file("0000:01:00.0", "sriov_numvfs"), "2\n").unwrap();
    refused(
        "0000:01:00.0",
        ErrorCode::SriovOn,
        "0000:01:00.0 has SR-IOV on (2 virtual functions): lend those, or remove them first with \
         echo 0 > /sys/bus/pci/devices/0000:01:00.0/sriov_numvfs",
    );
    rig.function("0000:01:00.2", 4, None);
    rig.function("0000:01:00.3", 4, Some("nvme"));
    refused(
        "0000:01:00.2",
        ErrorCode::GroupInUse,
        "0000:01:00.2 shares IOMMU group 4 with devices that this host uses (0000:01:00.3 \
         (nvme)): the IOMMU cannot tell them apart. Unbind those, or put the device into a slot \
         with ACS",
    );
    rig.function(VF, 5, None);
    fs::write(rig.file(VF, "reset_method"), "\n").unwrap();
    refused(
        VF,
        ErrorCode::NoReset,
        "0000:01:00.1 has no reset method, so one tenant's state would reach the next: it cannot \
         be lent",
    );
}

#[test]
fn what_changed_since_it_was_added_is_refused_when_it_is_offered() {
    let rig = Rig::apart(tempfile::tempdir().unwrap());
    rig.wait_session();
    let bdf = BdfText::from(bdf("0000:01:00.0"));
    rig.function("0000:01:00.0", 3, None);
    rig.hosts[0].handle(Verb::Add { bdf }).unwrap();
    fs::write(rig.file("0000:01:00.0", "sriov_numvfs"), "1\n").unwrap();
    let before = rig.left();
    let refusal = rig.hosts[0]
        .handle(Verb::Available { bdf, port: None })
        .unwrap_err();
    assert_eq!(refusal.code, ErrorCode::SriovOn);
    assert_eq!(rig.left(), before);
}

#[test]
fn fdids_that_cannot_be_borrowed_are_refused_in_words() {
    let rig = Rig::new();
    rig.refused(
        ErrorCode::UnknownFunction,
        "0000:01:00.7 is not in this lender's pool: see `sublet list`",
        |borrow| borrow.fdid = "40107".to_owned(),
    );
    rig.refused(
        ErrorCode::NotAllowed,
        "80100 is a function of this very host: give it to a VM by VFIO",
        |borrow| borrow.fdid = "80100".to_owned(),
    );
    rig.refused(
        ErrorCode::NoSession,
        "no port leads to node 9 (ntb0 leads to node 4): check the fdid with `sublet list`, and \
         the link with `sublet status`",
        |borrow| borrow.fdid = "90100".to_owned(),
    );
    rig.borrow(|_| {}).unwrap();
    let text = format!(
        "40101 is borrowed here already, at {}/vf.sock: `sublet return 40101` first",
        rig.dir.path().display()
    );
    rig.refused(ErrorCode::Taken, &text, |_| {});
    let fdid = fdid("40101");
    rig.hosts[1].handle(Verb::Return { fdid }).unwrap();
    let refusal = rig.hosts[1].handle(Verb::Return { fdid }).unwrap_err();
    assert_eq!(refusal.code, ErrorCode::NoLease);
}

#[test]
fn function_that_somebody_else_has_is_taken_and_its_lease_goes_on() {
    let rig = Rig::new();
    let engine = &rig.hosts[1].ports[0].engine;
    let (lease, _, other) = engine.borrow(bdf(VF), None).unwrap();
    rig.refused(
        ErrorCode::Taken,
        "0000:01:00.1 is in use: return it where it is borrowed first",
        |_| {},
    );
    assert_eq!(other.lost(), None);
    engine.give_back(lease).unwrap();
    rig.borrow(|_| {}).unwrap();
}

#[test]
fn ram_that_the_window_does_not_hold_is_refused_with_the_figure_that_would_do() {
    let rig = Rig::new();
    let figure = |wanted: u64, free: u64, enough: u64| {
        format!(
            "the guest's RAM needs {wanted} bytes of the NTB window; {free} of {WINDOW_BYTES} are \
             free: a window of {enough} bytes would do (set it in both hosts' firmware), or use \
             less memory"
        )
    };
    let free = WINDOW_BYTES - (64 << 10);
    // The whole window, but for the mailbox; and far more than any window.
    for (ram, enough) in [(WINDOW_BYTES, 128 << 20), (1 << 40, 1 << 41)] {
        let text = figure(ram, free, enough);
        rig.refused(ErrorCode::WindowFull, &text, |borrow| {
            borrow.ram = Some(ram)
        });
    }
    rig.borrow(|borrow| borrow.ram = Some(WINDOW_BYTES / 2))
        .unwrap();
}

#[test]
fn mapped_bars_without_trust_are_refused_in_words() {
    let rig = Rig::new();
    let mapped = |trust_vmm: bool, domain: Option<&str>| {
        let domain = domain.map(str::to_owned);
        move |borrow: &mut Borrow| {
            borrow.bars = Some(BarMode::Mapped);
            borrow.trust_vmm = trust_vmm;
            borrow.trust_domain = domain;
        }
    };
    rig.refused(
        ErrorCode::Trust,
        "mapped BARs make the VMM as powerful as port `ntb0`: say --trust-vmm if it is to be, or \
         use --bars trapped",
        mapped(false, None),
    );
    rig.refused(
        ErrorCode::Trust,
        "port `ntb0` is of trust domain `lab`, and a mapped lease of `other` could reach what is \
         of `lab`: use --bars trapped",
        mapped(true, Some("other")),
    );
    let port = &rig.hosts[1].ports[0];
    let fdid = "40102".parse().unwrap();
    let refuse = |others: &[(Fdid, BarMode, &str)], bars: BarMode, domain: &str| {
        let others = others.iter().copied();
        borrow::trust(port, others, bars, true, domain).map_err(|error| error.text)
    };
    let clash = |held: &str, wanted: &str| {
        Err(format!(
            "40102 is borrowed through port `ntb0` for trust domain `{held}`, and this lease is \
             for `{wanted}`: with mapped BARs on a port all its leases are of one domain. Return \
             40102 first, or use --bars trapped for both"
        ))
    };
    let (all, trapped) = (BarMode::Mapped, BarMode::Trapped);
    assert_eq!(
        refuse(&[(fdid, trapped, "other")], all, "lab"),
        clash("other", "lab")
    );
    assert_eq!(
        refuse(&[(fdid, all, "lab")], trapped, "other"),
        clash("lab", "other")
    );
    assert_eq!(refuse(&[(fdid, trapped, "lab")], trapped, "other"), Ok(()));
    assert_eq!(refuse(&[(fdid, all, "lab")], all, "lab"), Ok(()));
    // Host 4's configuration trusts no VMM with its port.
    let port = &rig.hosts[0].ports[0];
    let refusal = borrow::trust(port, [].into_iter(), all, true, "lab").unwrap_err();
    assert_eq!(
        refusal.text,
        "the configuration lets no VMM have port `ntb0`'s window: set trust_vmm = true on the \
         port, or use --bars trapped"
    );
}

#[test]
fn peer_with_another_protocol_version_is_told_by_status_and_by_borrow() {
    let rig = Rig::apart(tempfile::tempdir().unwrap());
    let [lender, borrower] = &rig.hosts;
    lender.ports[0].engine.stop();
    let peer = rig.link.port(0);
    peer.link_enable(true);
    let status = until("the mismatch", || {
        for (index, word) in FOREIGN_POST {
            peer.peer_spad_write(index, word);
        }
        let status = borrower.report().ports.remove(0);
        status.session.peer_versions.is_some().then_some(status)
    });
    let words = "the peer speaks protocol versions 7..=9, this host 1..=1: upgrade the older one";
    assert_eq!(status.session.state, words);
    assert_eq!(status.session.own_versions, Some([1, 1]));
    assert_eq!(status.session.peer_versions, Some([7, 9]));
    let refusal = rig.borrow(|_| {}).unwrap_err();
    let text = format!(
        "no port leads to node 4 (ntb0 has no open session: {words}): check the fdid with `sublet \
         list`, and the link with `sublet status`"
    );
    assert_eq!(refusal, VerbError::new(ErrorCode::Version, text));
}

#[test]
fn revoke_that_the_peer_has_not_confirmed_shows_in_status_until_it_has() {
    let rig = Rig::new();
    let port = |side: usize| rig.hosts[side].report().ports.remove(0);
    rig.borrow(|_| {}).unwrap();
    let before = port(0);
    assert_eq!(before.quarantine, PortQuarantine::default());
    // The borrower's host stands still: nobody there confirms anything.
    rig.link.host(1).freeze();
    rig.hosts[0].ports[0].engine.revoke(bdf(VF), "wanted back");
    let held = until("the slices are in quarantine", || {
        let now = port(0);
        (now.quarantine.slices != 0).then_some(now)
    });
    let regions = rig.function.info().regions[..6].iter();
    let bars: Vec<u64> = regions
        .map(|region| region.size)
        .filter(|size| *size != 0)
        .collect();
    let bytes = bars.iter().sum();
    let expected = PortQuarantine {
        slices: bars.len() as u64,
        bytes,
        vectors: 0,
    };
    assert_eq!(held.quarantine, expected);
    assert_eq!(held.window.free, before.window.free, "nobody gets them");
    until("its heartbeat is seen to stand still", || {
        let age = port(0).mailbox.heartbeat_age_ms.expect("a session is open");
        (age > 20 * 10).then_some(())
    });
    rig.link.host(1).thaw();
    let after = until("the quarantine is over", || {
        let now = port(0);
        (now.quarantine == PortQuarantine::default()).then_some(now)
    });
    assert_eq!(after.session.id, before.session.id, "by the peer's word");
    assert_eq!(
        after.window.free,
        before.window.free.map(|free| free + bytes)
    );
}

#[test]
fn lease_without_a_named_socket_has_a_folder_of_its_own_that_nobody_else_can_pass() {
    use std::os::unix::fs::PermissionsExt;
    let rig = Rig::new();
    let verb = |socket: &str| Verb::Borrow {
        fdid: fdid("40101"),
        socket: socket.into(),
        ram: None,
        bars: None,
        trust_vmm: false,
        trust_domain: None,
    };
    let told = match rig.hosts[1].handle(verb("")).unwrap() {
        Outcome::Borrowed(told) => told.socket,
        other => panic!("{other:?}"),
    };
    let folder = rig.dir.path().join("40101");
    assert_eq!(told, folder.join("vfio-user.sock"));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&folder), mode(&told)), (0o700, 0o600));
    let fdid = fdid("40101");
    rig.hosts[1].handle(Verb::Return { fdid }).unwrap();
    assert!(!folder.exists());
    // A named one is the operator's, and its folder stays as it is.
    rig.hosts[1].handle(verb("vf.sock")).unwrap();
    assert_eq!(mode(&rig.dir.path().join("vf.sock")), 0o600);
    assert!(!folder.exists());
}

#[test]
fn lease_is_written_down_and_status_tells_its_epoch_and_age_but_no_secret() {
    let rig = Rig::new();
    rig.borrow(|_| {}).unwrap();
    let lent = until("the open path is written down", || {
        let lent = rig.hosts[0].report().lent.remove(0);
        (lent.ttl_ms.is_none() && lent.age_ms.is_some()).then_some(lent)
    });
    assert_eq!((lent.epoch, lent.lease), (Some(1), Some(Hex64(1))));
    let Outcome::Status(status) = rig.hosts[0].handle(Verb::Status).unwrap() else {
        panic!("no status")
    };
    let json = serde_json::to_string(&status).unwrap();
    assert!(!json.contains("secret"), "{json}");
    assert_eq!(status.store.folder, rig.state.path().join("4"));
    assert_eq!(status.store.last_error, None);
    let moves = rig.hosts[0].pool.as_ref().unwrap().journal(9).unwrap();
    assert!(matches!(&moves[0].moved, Move::Granted(holder) if holder.borrower == Some(8)));
    assert_eq!(moves[1].moved, Move::Opened);
    let fdid = fdid("40101");
    rig.hosts[1].handle(Verb::Return { fdid }).unwrap();
    until("the end is written down", || {
        let newest = rig.hosts[0]
            .pool
            .as_ref()
            .unwrap()
            .journal(1)
            .unwrap()
            .remove(0)
            .moved;
        matches!(newest, Move::Ended(end) if end.cause == Cause::Returned).then_some(())
    });
}

#[test]
fn lease_of_a_daemon_that_was_killed_is_reclaimed_and_the_next_epoch_is_greater() {
    let state = tempfile::tempdir().unwrap();
    let folder = state.path().join("4");
    let holder = Holder {
        port: "ntb0".into(),
        borrower: Some(8),
        since_unix_ms: 0,
    };
    let record = LeaseRecord {
        function: FunctionKey::from(bdf(VF)),
        epoch: 41,
        holder: Some(holder.clone()),
        last_end: None,
    };
    let entry = JournalEntry {
        unix_ms: 0,
        function: record.function.clone(),
        epoch: 41,
        moved: Move::Granted(holder),
    };
    let change = Change {
        expect: None,
        record,
        entry,
    };
    RedbStore::open(&folder).unwrap().commit(&change).unwrap();
    let rig = Rig::on(state);
    let lent = rig.hosts[0].report().lent.remove(0);
    assert_eq!(lent.state, Availability::Available);
    assert_eq!(lent.last_end.as_deref(), Some("reclaimed"));
    let newest = rig.hosts[0]
        .pool
        .as_ref()
        .unwrap()
        .journal(1)
        .unwrap()
        .remove(0);
    assert!(matches!(newest.moved, Move::Ended(end) if end.cause == Cause::Reclaimed));
    let Outcome::Borrowed(borrowed) = rig.borrow(|_| {}).unwrap() else {
        panic!("not borrowed")
    };
    assert_eq!(borrowed.lease, Hex64(42));
    // Its store is its own: a second daemon on it does not start.
    let error = RedbStore::open(&folder).err().unwrap();
    assert!(
        error.to_string().contains("stop the other daemon"),
        "{error}"
    );
}
