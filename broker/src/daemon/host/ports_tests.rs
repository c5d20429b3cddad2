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
    let dir = dir.display();
    let text = format!(
        "[node]\nid = {node}\nname = \"n{node}\"\n[daemon]\ncontrol = \"{dir}/c.sock\"\n\
         sockets = \"{dir}\"\nstate = \"{dir}/state{node}\"\n{}[limits]\nfunctions_per_port = {limit}\n\
         [policy]\nallow = [\"0000:01:*\"]\n",
        port_lines(ports.len())
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
