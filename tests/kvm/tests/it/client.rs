//! The vfio-user client in front of the server: a function behind a socket keeps the contract, and a guest drives it from there.

use crate::fabric::Fabric;
use kvm_tests::{RAM_BYTES, ids, until, vms};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use vfio_shim::model::{Function, FunctionError};
use vfio_shim::ntb::soft::{ARC_BAR0_BYTES, SoftFunction};
use vmm_glue::kvm::tiny::{self, Verdict};
use vmm_glue::vfio_user::{Client, Endpoint, Options, SessionShared, SessionState};

/// An endpoint in a thread. Its memory check reads this process's own memory map.
pub struct Served {
    dir: tempfile::TempDir,
    stop: OwnedFd,
    shared: Arc<SessionShared>,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    pub fn new(function: Arc<dyn Function>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = Endpoint::bind(&dir.path().join("vf.sock")).unwrap();
        let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let shared = Arc::new(SessionShared::default());
        let thread = std::thread::spawn({
            let (stop, shared) = (stop.try_clone().unwrap(), Arc::clone(&shared));
            move || {
                let options = Options::default();
                let served = endpoint.serve(&function, &options, stop.as_fd(), &shared);
                served.unwrap();
            }
        });
        Self {
            dir,
            stop,
            shared,
            thread: Some(thread),
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("vf.sock")
    }

    pub fn connect(&self) -> Client {
        Client::connect(&self.socket()).unwrap()
    }

    /// The server has undone the last session.
    pub fn wait_idle(&self) {
        until("the session is undone", || {
            self.shared.state() == SessionState::Waiting
        });
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        rustix::io::write(&self.stop, &1u64.to_ne_bytes()).unwrap();
        let joined = self.thread.take().unwrap().join();
        assert!(joined.is_ok() || std::thread::panicking());
    }
}

mod contract_over_the_socket {
    use super::*;
    use vfio_shim::function_contract;
    use vfio_shim::model::contract::{self, Driver};
    use vfio_shim::ntb::soft::recipe::{ARC, ENGINE};

    macro_rules! engine_tests {
        ($($name:ident)*) => { mod engine { use super::*; $(#[test] fn $name() {
            let served = Served::new(Arc::new(SoftFunction::new(ids(), 4)));
            contract::$name(&Driver::new(&served.connect(), ENGINE));
        })* } };
    }
    macro_rules! arc_tests {
        ($($name:ident)*) => { mod arc { use super::*; $(#[test] fn $name() {
            let served = Served::new(Arc::new(SoftFunction::arc_pro(1 << 28).unwrap()));
            contract::$name(&Driver::new(&served.connect(), ARC));
        })* } };
    }
    function_contract! { engine_tests }
    function_contract! { arc_tests }
}

#[test]
fn guest_behind_a_socket_drives_the_arc_of_the_other_host() {
    let vram_bytes = 16 << 20;
    let function = SoftFunction::arc_pro(vram_bytes).unwrap();
    let fabric = Fabric::of(function, 1, ARC_BAR0_BYTES + vram_bytes);
    for vm in vms() {
        let (lease, function) = fabric.borrow();
        let served = Served::new(function);
        let guest = crate::arc::place(vm, Arc::new(served.connect()));
        assert_eq!(guest.run(&crate::arc::work(10, vram_bytes)), Verdict::Done);
        assert_eq!(tiny::taken(&guest.ram, crate::arc::VECTOR), 10);
        assert_eq!(served.shared.counters.bytes_now.get(), RAM_BYTES);
        drop(guest);
        served.wait_idle();
        assert_eq!(served.shared.last_error(), None);
        drop(served);
        fabric.engines[1].give_back(lease).unwrap();
        assert_eq!(fabric.maps(), [1, 1, 0], "the mailboxes");
    }
}

#[test]
fn reset_that_the_function_refuses_is_told_to_the_vmm() {
    let function = Arc::new(SoftFunction::new(ids(), 4));
    let served = Served::new(function.clone());
    let client = served.connect();
    // A reset of what nobody touched is not asked of the function.
    client
        .region_write(vfio_shim::model::RegionIndex(0), 0x30, &[1; 8])
        .unwrap();
    function.arm(
        vfio_shim::ntb::soft::FaultPlan::default().nth(vfio_shim::ntb::soft::Fault::ResetFails, 1),
    );
    assert!(matches!(client.reset(), Err(FunctionError::Kernel { .. })));
    client.reset().unwrap();
}
