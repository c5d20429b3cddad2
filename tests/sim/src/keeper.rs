//! A host's keeper as a process of its own: it opens functions for the port, on a tree of files whose kernel is played.

use crate::host::Lent;
use crate::scheduler::{Core, Process, Scheduler};
use crate::steps::{KeeperStep, Step};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::geteuid;
use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use sublet::config::Config;
use sublet::daemon::vocabulary::VerbError;
use sublet::keeper::{Claimed, Ground, Keeper, Waits};
use vfio_shim::model::{Bdf, Runtime};
use vfio_shim::path::Keep;
use vfio_shim::sysfs::Sysfs;
use vfio_shim::vfio::{OpenError, OpenGroup};

/// The driver that a keeper binds functions to.
const VFIO: &str = "vfio-pci";

/// The read end of each group that was opened last: it is busy until the write end is closed by
/// everybody, as the kernel's is until its last descriptor is.
type Groups = Arc<Mutex<BTreeMap<Bdf, OwnedFd>>>;

/// What a function's device is to the kernel: open as long as this is there.
pub type Device = Arc<Mutex<Option<OwnedFd>>>;

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A host's tree, which outlives its keepers, and the keeper of now.
pub struct KeeperHost {
    tree: PathBuf,
    groups: Groups,
    /// The keeper's process, while that lives.
    pub process: Option<Process>,
    /// What the keeper of now sees the tree by. Without it nothing of that keeper's arrives, as of a
    /// process that was killed.
    link: PathBuf,
    started: u64,
}

fn put(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
    fs::write(path, text).expect("a file of the tree");
}

impl KeeperHost {
    /// A host that has just been switched on: nothing is bound.
    pub fn new(tree: PathBuf, functions: &[Lent]) -> Self {
        let sys = tree.join("sys");
        put(&sys.join("bus/pci/drivers_probe"), "");
        put(&sys.join("bus/pci/drivers").join(VFIO).join("unbind"), "");
        for (group, lent) in functions.iter().enumerate() {
            let bdf = lent.bdf.to_string();
            let device = sys.join("bus/pci/devices").join(&bdf);
            let ids = ["vendor", "device", "subsystem_vendor", "subsystem_device"];
            for name in ids.into_iter().chain(["class", "revision"]) {
                put(&device.join(name), "0x0\n");
            }
            put(&device.join("driver_override"), "(null)\n");
            put(&device.join("reset_method"), "flr\n");
            let group = sys.join("kernel/iommu_groups").join(group.to_string());
            fs::create_dir_all(group.join("devices").join(bdf)).expect("a group");
            symlink(group, device.join("iommu_group")).expect("a link to the group");
        }
        Self {
            link: tree.join("0"),
            tree,
            groups: Groups::default(),
            process: None,
            started: 0,
        }
    }

    /// Where clients find its keepers.
    pub fn folder(&self) -> PathBuf {
        self.tree.join("keeper")
    }

    /// Starts the next keeper, which takes over what the last one had bound.
    pub fn start(&mut self, scheduler: &mut Scheduler, side: usize) {
        let process = scheduler.process(side);
        self.started += 1;
        self.link = self.tree.join(self.started.to_string());
        symlink(&self.tree, &self.link).expect("a link to the tree");
        let claimed = Claimed::at(&self.link.join("keeper"), geteuid().as_raw());
        let serving = claimed.expect("a keeper's folder").take_over(
            scheduler.runtime(process),
            config(),
            self.ground(scheduler.core(), process),
            Waits::default(),
        );
        let serving = serving.expect("a keeper");
        let serve = move || serving.serve(&[]).expect("a keeper that serves");
        scheduler.start(process, "keeper", Box::new(serve));
        self.process = Some(process);
    }

    /// Kills it where it stands.
    pub fn kill(&mut self, scheduler: &mut Scheduler) {
        if let Some(process) = self.process.take() {
            fs::remove_file(&self.link).expect("the link of a keeper that lives");
            scheduler.kill(process);
        }
    }

    fn ground(&self, core: &Arc<Core>, process: Process) -> Ground {
        let (tree, groups) = (self.tree.join("sys"), Arc::clone(&self.groups));
        let reach = {
            let core = Arc::clone(core);
            move |step| {
                core.reach(process, Step::Keeper(step));
                core.pace();
            }
        };
        let wrote = reach.clone();
        let on_write = move |path: &Path, text: &str| {
            kernel(&tree, &groups, path, text);
            wrote(KeeperStep::Wrote);
        };
        let groups = Arc::clone(&self.groups);
        let open = move |bdf: Bdf, sysfs: &Sysfs| {
            reach(KeeperStep::Opens);
            let opened = open(&groups, bdf, sysfs);
            reach(KeeperStep::Opened);
            opened
        };
        Ground {
            top: self.link.clone(),
            sysfs: Sysfs::stand_in(self.link.join("sys"), Arc::new(on_write)),
            open: Box::new(open),
        }
    }

    /// Whether it is bound by a keeper that has written that down, or as before and not written
    /// down; none in between.
    pub fn is_bound(&self, bdf: Bdf) -> Option<bool> {
        let device = self.tree.join("sys/bus/pci/devices").join(bdf.to_string());
        let driver = fs::read_link(device.join("driver")).ok();
        let wanted = fs::read_to_string(device.join("driver_override")).expect("an override");
        let recorded = self.folder().join("bound").join(bdf.to_string()).exists();
        let by_vfio = driver.as_ref().is_some_and(|driver| driver.ends_with(VFIO));
        match (by_vfio, wanted.trim(), recorded) {
            (true, VFIO, true) => Some(true),
            (false, "" | "(null)", false) if driver.is_none() => Some(false),
            _ => None,
        }
    }
}

fn config() -> Config {
    let text = "[node]\nid = 4\nname = \"a\"\n\
        [[port]]\nname = \"n\"\nbdf = \"02:00.0\"\npeers = \"cable\"\ntrust_domain = \"t\"\n\
        [policy]\nallow = [\"4a:00.*\"]\n";
    Config::parse(Path::new("keeper.toml"), text).expect("a configuration")
}

/// What a kernel does on unbind and probe.
fn kernel(sys: &Path, groups: &Groups, path: &Path, text: &str) {
    let text = text.trim();
    let device = |name: &str| sys.join("bus/pci/devices").join(text).join(name);
    let parts: Vec<_> = path
        .iter()
        .map(|part| part.to_str().unwrap_or(""))
        .collect();
    match parts[..] {
        ["bus", "pci", "drivers_probe"] => {
            let wanted = fs::read_to_string(device("driver_override")).expect("an override");
            let wanted = sys.join("bus/pci/drivers").join(wanted.trim());
            if wanted.join("unbind").exists() && !device("driver").exists() {
                symlink(wanted, device("driver")).expect("a driver");
            }
        }
        ["bus", "pci", "drivers", _, "unbind"] => {
            // A kernel would wait here for as long as somebody has it open.
            let bdf = text.parse().expect("an address");
            assert!(
                !is_open(groups, bdf),
                "INVARIANT keeper: {text} is unbound under its holder"
            );
            let _ = fs::remove_file(device("driver"));
        }
        _ => {}
    }
}

fn open(groups: &Groups, bdf: Bdf, sysfs: &Sysfs) -> Result<OpenGroup, OpenError> {
    let told = |error| OpenError::Sysfs(bdf, error);
    let group = sysfs.iommu_group(bdf).map_err(told)?;
    let driver = sysfs.driver(bdf).map_err(told)?.unwrap_or_default();
    if driver != VFIO {
        return Err(OpenError::NotVfio { bdf, driver });
    }
    if is_open(groups, bdf) {
        return Err(OpenError::Busy { bdf, group });
    }
    let (seen, held) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
    lock(groups).insert(bdf, seen);
    Ok(OpenGroup {
        group: held,
        container: eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd"),
        kept: None,
    })
}

fn is_open(groups: &Groups, bdf: Bdf) -> bool {
    let groups = lock(groups);
    let Some(seen) = groups.get(&bdf) else {
        return false;
    };
    let mut fds = [PollFd::new(seen, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).expect("a look");
    !fds[0].revents().contains(PollFlags::HUP)
}

/// What a port has of a function that a keeper has opened for it.
struct Opened {
    _group: OpenGroup,
    device: Device,
    runtime: Arc<dyn Runtime>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        // Of a process that was killed, the kernel closes it after all that it was used for.
        if !self.runtime.is_killed() {
            lock(&self.device).take();
        }
    }
}

/// Opens a function by the keeper of this folder, for a port that runs on this.
pub fn open_by(
    folder: &Path,
    bdf: Bdf,
    device: &Device,
    runtime: Arc<dyn Runtime>,
) -> Result<Keep, VerbError> {
    let opened = Keeper::at(folder).on(Arc::clone(&runtime)).open(bdf)?;
    let held = opened.group.try_clone().expect("a descriptor");
    let before = lock(device).replace(held);
    assert!(
        before.is_none(),
        "INVARIANT keeper: {bdf} is handed over twice"
    );
    let opened = Opened {
        _group: opened,
        device: Arc::clone(device),
        runtime,
    };
    Ok(Keep {
        kept: Some(Box::new(opened)),
        ..Keep::default()
    })
}
