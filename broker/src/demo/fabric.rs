//! The demonstration's two hosts: host 4 with an Arc-shaped PF, host 8, a soft NTB between them, each with its control socket.

use super::claim::{DemoError, setup};
use super::functions::SoftFunctions;
use crate::cli::request_on;
use crate::config::Config;
use crate::daemon::control::{Deadlines, serve};
use crate::daemon::host::{Machine, Workers, start_on};
use crate::daemon::socket::ControlSocket;
use crate::daemon::status::HostStatus;
use crate::daemon::vocabulary::{ErrorCode, Outcome, Verb, VerbError};
use rustix::event::{EventfdFlags, eventfd};
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use vfio_shim::model::Bdf;
use vfio_shim::ntb::soft::{
    Fault, FaultPlan, SoftFunction, SoftHost, SoftLink, SoftPf, SoftPortConfig, VfShape,
};

/// The lender and the borrower.
pub(super) const LENDER: u16 = 4;
const BORROWER: u16 = 8;
/// The seed document's PF, with 16 GiB of memory for eight VFs; nothing of it takes room until it
/// is stored to.
const PF: &str = "0000:4a:00.0";
pub(super) const VRAM_BYTES: u64 = 2 << 30;
pub(super) const VFS: u16 = 5;
/// Room for the BARs of a VF and the memory of its guest.
const WINDOW_BYTES: u64 = 4 << 30;
/// Half of a device's stores stay behind until so many operations later, unless they are pushed.
const HELD_OPERATIONS: u32 = 64;
const HELD_CHANCE: u32 = 512;
const SEED: u64 = 0x4a01;

/// What the fabric does at all times: it holds DMA back, as PCIe may.
pub(super) fn plan() -> FaultPlan {
    FaultPlan::seeded(SEED).chance(Fault::DmaHeld(HELD_OPERATIONS), HELD_CHANCE)
}

/// Both hosts. Fields end in order: the borrower, the lender, the cable, the device.
pub(super) struct Fabric {
    pub(super) borrower: Node,
    pub(super) lender: Node,
    pub(super) link: SoftLink,
    pub(super) pf: Arc<SoftPf>,
}

impl Fabric {
    /// Starts both hosts in this folder; the PF has no VFs.
    pub(super) fn start(folder: &Path) -> Result<Self, DemoError> {
        let hosts = [SoftHost::new(), SoftHost::new()];
        let bdf: Bdf = PF.parse().map_err(setup("name its PF"))?;
        let shape = VfShape::ArcPro {
            vram_bytes: VRAM_BYTES,
        };
        let pf = SoftPf::new(bdf, shape, Arc::clone(&hosts[0])).map_err(setup("make its PF"))?;
        let pf = Arc::new(pf);
        let port = SoftPortConfig {
            window_bytes: [WINDOW_BYTES; 2],
        };
        let link = SoftLink::between(hosts, [port; 2], plan()).map_err(setup("make its NTB"))?;
        let functions = Arc::new(SoftFunctions::new(vec![Arc::clone(&pf)]));
        let none = Arc::new(SoftFunctions::new(Vec::new()));
        let machine = |side: usize, functions: Arc<SoftFunctions>| Machine {
            ports: vec![link.port(side)],
            functions,
        };
        let lender = Node::start(LENDER, folder, machine(0, functions))?;
        let borrower = Node::start(BORROWER, folder, machine(1, none))?;
        Ok(Self {
            borrower,
            lender,
            link,
            pf,
        })
    }

    /// The VF that is lent, and its address.
    pub(super) fn vf(&self) -> Option<(Bdf, Arc<SoftFunction>)> {
        self.pf.vfs().into_iter().next()
    }
}

/// One host: the daemon's own code, behind its control socket.
pub(super) struct Node {
    control: PathBuf,
    stop: OwnedFd,
    thread: Option<JoinHandle<io::Result<()>>>,
}

fn config(node: u16, folder: &Path) -> String {
    let folder = folder.display();
    format!(
        "[node]\n\
         id = {node}\n\
         name = \"host{node}\"\n\
         [daemon]\n\
         control = \"{folder}/control.sock\"\n\
         sockets = \"{folder}\"\n\
         state = \"{folder}/state\"\n\
         [[port]]\n\
         name = \"ntb0\"\n\
         bdf = \"0000:17:00.0\"\n\
         peers = \"cable\"\n\
         trust_domain = \"demo\"\n\
         heartbeat_ms = 50\n\
         lost_after_ms = 10000\n\
         [policy]\n\
         allow = [\"0000:4a:00.*\"]\n"
    )
}

impl Node {
    fn start(node: u16, folder: &Path, machine: Machine) -> Result<Self, DemoError> {
        let folder = folder.join(format!("host{node}"));
        std::fs::create_dir(&folder).map_err(setup("make a host's folder"))?;
        let text = config(node, &folder);
        let config = Config::parse(Path::new("the demonstration's own configuration"), &text);
        let config = config.map_err(setup("read its own configuration"))?;
        let socket = ControlSocket::claim(&config.control);
        let socket = socket.map_err(setup("have a control socket"))?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(setup("have an eventfd"))?;
        let stopped = stop.try_clone().map_err(setup("have an eventfd"))?;
        let host = start_on(&config, machine, Workers::Threads).map_err(setup("start a host"))?;
        let builder = std::thread::Builder::new().name(format!("control-{node}"));
        let serve = move || serve(&socket, &host, stopped.as_fd(), Deadlines::default());
        let thread = builder.spawn(serve).map_err(setup("start a host"))?;
        Ok(Self {
            control: config.control,
            stop,
            thread: Some(thread),
        })
    }

    /// Has its daemon do a verb, as an operator would; returns when the daemon has closed its end,
    /// so that what both hold can be counted.
    pub(super) fn ask(&self, verb: &Verb) -> Result<Outcome, VerbError> {
        let failed = |error: io::Error| VerbError::new(ErrorCode::NoDaemon, error.to_string());
        let mut stream = UnixStream::connect(&self.control).map_err(failed)?;
        let outcome = request_on(&stream, &self.control, verb);
        stream.shutdown(Shutdown::Write).map_err(failed)?;
        stream.read_to_end(&mut Vec::new()).map_err(failed)?;
        outcome
    }

    /// What `sublet status` shows.
    pub(super) fn status(&self) -> Result<HostStatus, VerbError> {
        match self.ask(&Verb::Status)? {
            Outcome::Status(status) => Ok(*status),
            other => {
                let text = format!("the daemon answered with {other:?}");
                Err(VerbError::new(ErrorCode::Internal, text))
            }
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("a host of the demonstration ended by a panic");
        }
    }
}
