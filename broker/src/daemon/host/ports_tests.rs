//! A host with two ports: which one a function is offered through, and how many go through each.

use super::*;
use crate::daemon::vocabulary::{BdfText, FdidText};
use std::path::{Path, PathBuf};
use vfio_shim::model::{Function, FunctionIds};
use vfio_shim::ntb::soft::{SoftFunction, SoftLink, SoftPortConfig};
use vfio_shim::path::Keep;

const PATIENCE: Duration = Duration::from_secs(20);
const FIRST: &str = "0000:01:00.1";
const SECOND: &str = "0000:01:00.2";

/// Functions that can all be lent.
struct Willing;

impl Functions for Willing {
    fn check_exists(&self, _bdf: Bdf) -> Result<(), VerbError> {
        Ok(())
    }

    fn ids(&self, _bdf: Bdf) -> Result<FunctionIds, VerbError> {
        Ok(FunctionIds::default())
    }

    fn check_lendable(&self, _bdf: Bdf) -> Result<(), VerbError> {
        Ok(())
    }

    fn open(&self, _bdf: Bdf) -> Result<OpenFunction, VerbError> {
        let function: Arc<dyn Function> = Arc::new(SoftFunction::new(FunctionIds::default(), 1));
        Ok(OpenFunction {
            function,
            serial: 0,
            keep: Keep::default(),
        })
    }
}

fn bdf(text: &str) -> BdfText {
    text.parse::<Bdf>().unwrap().into()
}

fn port_lines(count: usize) -> String {
    let port = |index| {
        format!(
            "[[port]]\nname = \"ntb{index}\"\nbdf = \"0000:02:00.{index}\"\npeers = \"cable\"\n\
             trust_domain = \"lab\"\nheartbeat_ms = 10\nlost_after_ms = 10000\n"
        )
    };
    (0..count).map(port).collect()
}

fn host(node: u16, ports: Vec<Arc<dyn NtbPort>>, limit: u32, dir: &Path) -> LocalHost {
    let lines = port_lines(ports.len());
    host_with(node, ports, &lines, limit, dir)
}

fn host_with(
    node: u16,
    ports: Vec<Arc<dyn NtbPort>>,
    lines: &str,
    limit: u32,
    dir: &Path,
) -> LocalHost {
    let dir = dir.display();
    let text = format!(
        "[node]\nid = {node}\nname = \"n{node}\"\n[daemon]\ncontrol = \"{dir}/c.sock\"\n\
         sockets = \"{dir}\"\nstate = \"{dir}/state{node}\"\n{lines}[limits]\nfunctions_per_port = {limit}\n\
         [policy]\nallow = [\"0000:01:*\"]\n"
    );
    let config = Config::parse(Path::new("test.toml"), &text).unwrap();
    let functions = Arc::new(Willing);
    LocalHost::new(&config, Machine { ports, functions }, Workers::Threads).unwrap()
}

/// Node 4 lends by two ports; nodes 8 and 9 are at their far ends.
struct Rig {
    lender: LocalHost,
    borrowers: [LocalHost; 2],
    _links: [SoftLink; 2],
    _dir: tempfile::TempDir,
}

impl Rig {
    fn new(limit: u32) -> Self {
        let port = SoftPortConfig {
            window_bytes: [64 << 20; 2],
        };
        let links = [(); 2].map(|()| SoftLink::new([port; 2]).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let near = links
            .each_ref()
            .map(|link| link.port(0) as Arc<dyn NtbPort>);
        let far = |(node, at): (u16, usize)| host(node, vec![links[at].port(1)], limit, dir.path());
        let rig = Self {
            lender: host(4, near.to_vec(), limit, dir.path()),
            borrowers: [(8, 0), (9, 1)].map(far),
            _links: links,
            _dir: dir,
        };
        let deadline = Instant::now() + PATIENCE;
        while !rig
            .borrowers
            .iter()
            .all(|host| host.ports[0].peer_node() == Some(4))
        {
            assert!(Instant::now() < deadline, "no sessions");
            std::thread::sleep(Duration::from_millis(1));
        }
        for function in [FIRST, SECOND] {
            rig.lender.handle(Verb::Add { bdf: bdf(function) }).unwrap();
        }
        rig
    }

    fn available(&self, function: &str, port: Option<&str>) -> Result<Outcome, VerbError> {
        self.lender.handle(Verb::Available {
            bdf: bdf(function),
            port: port.map(str::to_owned),
        })
    }

    fn borrow(&self, at: usize, fdid: &str) -> Result<Outcome, VerbError> {
        self.borrowers[at].handle(Verb::Borrow {
            fdid: named(fdid),
            socket: PathBuf::from(format!("{fdid}-{at}.sock")),
            ram: None,
            bars: None,
            trust_vmm: false,
            trust_domain: None,
        })
    }

    /// How many functions a borrower is offered.
    fn seen(&self, at: usize) -> usize {
        let Ok(Outcome::List(entries)) = self.borrowers[at].handle(Verb::List) else {
            panic!("no list");
        };
        entries.len()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.borrowers.iter().for_each(Host::stop);
        self.lender.stop();
    }
}

fn named(fdid: &str) -> FdidText {
    fdid.parse::<Fdid>().unwrap().into()
}

#[test]
fn with_several_ports_a_function_is_offered_through_the_named_one_and_no_other() {
    let rig = Rig::new(64);
    assert_eq!(
        rig.available(FIRST, None),
        Err(VerbError::new(
            ErrorCode::Ambiguous,
            "this host has 2 ports (ntb0, ntb1), and a function goes through one: `sublet \
             available 0000:01:00.1 --port ntb0`"
        ))
    );
    assert_eq!(
        rig.available(FIRST, Some("ntb7")),
        Err(VerbError::new(
            ErrorCode::Config,
            "there is no port `ntb7` here: name one of ntb0, ntb1"
        ))
    );
    rig.available(FIRST, Some("ntb1")).unwrap();
    assert_eq!([rig.seen(0), rig.seen(1)], [0, 1]);
    // Once more is no error; elsewhere is.
    rig.available(FIRST, Some("ntb1")).unwrap();
    rig.available(FIRST, None).unwrap();
    assert_eq!(
        rig.available(FIRST, Some("ntb0")),
        Err(VerbError::new(
            ErrorCode::WrongState,
            "0000:01:00.1 is offered through port `ntb1`, and a function goes through one: \
             `sublet unavailable 0000:01:00.1` first"
        ))
    );
    rig.borrow(1, "40101").unwrap();
    let fdid = named("40101");
    rig.borrowers[1].handle(Verb::Return { fdid }).unwrap();
}

#[test]
fn limit_of_functions_per_port_holds_for_offers_and_for_leases_of_each_port() {
    let rig = Rig::new(1);
    rig.available(FIRST, Some("ntb0")).unwrap();
    assert_eq!(
        rig.available(SECOND, Some("ntb0")),
        Err(VerbError::new(
            ErrorCode::Limit,
            "1 functions are offered through port `ntb0`, its limit: take one back, use another \
             port, or raise limits.functions_per_port"
        ))
    );
    rig.available(SECOND, Some("ntb1")).unwrap();
    rig.borrow(0, "40101").unwrap();
    // A second function of the same port, whichever it is: the limit comes before the lender.
    assert_eq!(
        rig.borrow(0, "40102"),
        Err(VerbError::new(
            ErrorCode::Limit,
            "1 functions are borrowed through port `ntb0`, its limit: return one first, or raise \
             limits.functions_per_port"
        ))
    );
    rig.borrow(1, "40102").unwrap();
    let fdid = named("40101");
    rig.borrowers[0].handle(Verb::Return { fdid }).unwrap();
    let refusal = rig.borrow(0, "40102").unwrap_err();
    assert_eq!(
        refusal.code,
        ErrorCode::UnknownFunction,
        "there is room again"
    );
}

/// Node 8 has two cables; at either end is a host that says it is node 4, and offers one function.
struct TwoOfAName {
    far: [LocalHost; 2],
    near: LocalHost,
    _links: [SoftLink; 2],
    _dir: tempfile::TempDir,
}

impl TwoOfAName {
    /// With these lines for its ports.
    fn new(lines: &str) -> Self {
        let port = SoftPortConfig {
            window_bytes: [64 << 20; 2],
        };
        let links = [(); 2].map(|()| SoftLink::new([port; 2]).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let far = [0, 1].map(|at: usize| {
            let own = dir.path().join(at.to_string());
            let host = host(4, vec![links[at].port(0)], 64, &own);
            for verb in [
                Verb::Add { bdf: bdf(FIRST) },
                Verb::Available {
                    bdf: bdf(FIRST),
                    port: None,
                },
            ] {
                host.handle(verb).unwrap();
            }
            host
        });
        let near = links
            .each_ref()
            .map(|link| link.port(1) as Arc<dyn NtbPort>);
        let rig = Self {
            far,
            near: host_with(8, near.to_vec(), lines, 64, dir.path()),
            _links: links,
            _dir: dir,
        };
        let said = |port: &OpenPort| {
            let session = port.engine.status().and_then(|status| status.session);
            session.is_some_and(|session| session.info.peer_node.is_some())
        };
        let deadline = Instant::now() + PATIENCE;
        while !rig.near.ports.iter().all(said) {
            assert!(Instant::now() < deadline, "no sessions");
            std::thread::sleep(Duration::from_millis(1));
        }
        rig
    }

    fn borrow(&self) -> Result<Outcome, VerbError> {
        self.near.handle(Verb::Borrow {
            fdid: named("40101"),
            socket: PathBuf::from("vf.sock"),
            ram: None,
            bars: None,
            trust_vmm: false,
            trust_domain: None,
        })
    }

    /// Whether the host at this end of the two has lent it.
    fn has_lent(&self, at: usize) -> bool {
        let status = self.far[at].ports[0].engine.status().unwrap();
        status.lent[0].offer.lease.is_some()
    }

    fn list(&self) -> usize {
        match self.near.handle(Verb::List).unwrap() {
            Outcome::List(entries) => entries.len(),
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for TwoOfAName {
    fn drop(&mut self) {
        self.near.stop();
        self.far.iter().for_each(Host::stop);
    }
}

#[test]
fn of_two_hosts_that_say_one_name_neither_has_a_guests_memory_before_the_configuration_tells() {
    let rig = TwoOfAName::new(&port_lines(2));
    let refused = rig.borrow().unwrap_err();
    assert_eq!(refused.code, ErrorCode::Config, "{refused}");
    for words in ["(ntb0, ntb1)", "peer_node = 4"] {
        assert!(refused.text.contains(words), "{refused}");
    }
    assert!(!rig.has_lent(0) && !rig.has_lent(1));
}

#[test]
fn host_that_says_anothers_name_is_not_borrowed_from_nor_listed() {
    let name = "name = \"ntb1\"\n";
    let lines = port_lines(2).replace(name, &format!("{name}peer_node = 4\n"));
    let rig = TwoOfAName::new(&lines);
    assert_eq!(rig.list(), 1);
    rig.borrow().unwrap();
    assert!(!rig.has_lent(0) && rig.has_lent(1));
    let Outcome::Status(status) = rig.near.handle(Verb::Status).unwrap() else {
        panic!("no status");
    };
    let liar = &status.ports[0];
    assert_eq!(
        (liar.session.peer_node, status.ports[1].session.peer_node),
        (None, Some(4))
    );
    let why = liar.last_error.clone().unwrap();
    assert!(why.contains("`peer_node` of port `ntb1`"), "{why}");
    rig.near
        .handle(Verb::Return {
            fdid: named("40101"),
        })
        .unwrap();
    // Nor when the right one is away.
    rig.far[1].stop();
    let deadline = Instant::now() + PATIENCE;
    while rig.near.ports[1].peer_node().is_some() {
        assert!(Instant::now() < deadline, "it is there still");
        std::thread::sleep(Duration::from_millis(1));
    }
    let refused = rig.borrow().unwrap_err();
    assert_eq!(refused.code, ErrorCode::NoSession, "{refused}");
    assert!(
        refused.text.contains("`peer_node` of port `ntb1`"),
        "{refused}"
    );
    assert!(!rig.has_lent(0));
}
