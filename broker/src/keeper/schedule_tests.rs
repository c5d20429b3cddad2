//! A keeper that is killed between any two of its steps, and the next one: among clients that open, leave, die and hold on.

use super::{
    holds::{Client, Holds, Waits},
    journal::Journal,
    tests::*,
    *,
};
use crate::daemon::vocabulary::ErrorCode;
use proptest::{collection::vec, prelude::*};
use std::{
    fs,
    os::unix::fs::symlink,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};
use vfio_shim::{
    model::{Bdf, OsRuntime, Runtime},
    sysfs::Sysfs,
    vfio::OpenGroup,
};

const FUNCTIONS: [&str; 3] = [VF, OTHER, NTB];
/// One is bound to VFIO before any keeper, and has no override.
const BOUND: &str = NTB;
/// As many steps as the longest word takes: two writes, and a look on both sides.
const STEPS: u32 = 5;
/// A word that nobody interrupts.
const NEVER: u32 = u32::MAX;

fn runtime() -> Arc<dyn Runtime> {
    Arc::new(OsRuntime)
}

/// Nobody is waited for: what another thread would have to do is done by the next act.
const AT_ONCE: Waits = Waits {
    handover: Duration::ZERO,
    release: Duration::ZERO,
    step: Duration::ZERO,
    idle_step: Duration::ZERO,
};

#[derive(Clone, Copy, Debug)]
enum Act {
    /// A new client opens one of the functions.
    Open(usize),
    /// A client lets go of what it has, and says so.
    Leave(usize),
    /// A client says so, and holds on.
    HoldOn(usize),
    /// A client closes what another one has.
    Meddle(usize),
    /// A client dies.
    Die(usize),
    /// The keeper looks after what clients of the last one had.
    Tend,
    /// The keeper is killed as soon as it has written down that it is about to bind this.
    Record(usize),
    /// The operator gives a function that nobody has to a driver of this host, or takes it back.
    Drive(usize),
    /// The keeper is killed, and the next one starts.
    Next,
}

fn act() -> impl Strategy<Value = (Act, u32)> {
    let act = prop_oneof![
        4 => (0..FUNCTIONS.len()).prop_map(Act::Open),
        3 => (0..8usize).prop_map(Act::Leave),
        1 => (0..8usize).prop_map(Act::HoldOn),
        1 => (0..8usize).prop_map(Act::Meddle),
        2 => (0..8usize).prop_map(Act::Die),
        2 => Just(Act::Tend),
        1 => (0..FUNCTIONS.len()).prop_map(Act::Record),
        1 => (0..FUNCTIONS.len()).prop_map(Act::Drive),
        1 => Just(Act::Next),
    ];
    (act, prop_oneof![2 => Just(NEVER), 1 => 0..STEPS])
}

/// Whoever has a function, or has just had it.
struct Holder {
    client: Client,
    name: &'static str,
    opened: OpenGroup,
    /// Which keeper hears it.
    keeper: usize,
}

/// A keeper that sees the machine by a link of its own. Without it, no word of it arrives: as of a
/// process that was killed.
struct Alive {
    holds: Holds,
    link: PathBuf,
    /// How many steps it makes yet.
    left: Arc<AtomicU32>,
}

impl Alive {
    fn start(machine: &Machine, links: &Path, number: usize) -> Self {
        let link = links.join(number.to_string());
        symlink(machine.top(), &link).unwrap();
        let left = Arc::new(AtomicU32::new(NEVER));
        let step = {
            let (left, link) = (Arc::clone(&left), link.clone());
            move || {
                let before = left.load(Ordering::Relaxed);
                match before {
                    NEVER => {}
                    0 => drop(fs::remove_file(&link)),
                    _ => left.store(before - 1, Ordering::Relaxed),
                }
            }
        };
        let kernel = machine.kernel();
        let after = step.clone();
        let on_write = move |path: &Path, text: &str| {
            kernel(path, text);
            after();
        };
        let sysfs = Sysfs::stand_in(link.join("sys"), Arc::new(on_write));
        let open = machine.ground().open;
        let open = move |bdf: Bdf, sysfs: &Sysfs| {
            step();
            let opened = open(bdf, sysfs);
            step();
            opened
        };
        let ground = Ground {
            top: link.clone(),
            sysfs,
            open: Box::new(open),
        };
        let journal = Journal::open(&link.join("keeper/bound")).unwrap();
        let holds = Holds::new(machine.config(), ground, journal, AT_ONCE, runtime()).unwrap();
        Self { holds, link, left }
    }

    fn is_dead(&self) -> bool {
        fs::symlink_metadata(&self.link).is_err()
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        // Its guards find nothing to undo, as those of a killed process are never dropped.
        let _ = fs::remove_file(&self.link);
    }
}

struct World {
    machine: Machine,
    links: tempfile::TempDir,
    keeper: Alive,
    keepers: usize,
    holders: Vec<Holder>,
    clients: u64,
    before: Vec<(Option<String>, String)>,
}

impl World {
    fn new() -> Self {
        let machine = Machine::new();
        machine.bind_to(BOUND, "vfio-pci");
        let links = tempfile::tempdir().unwrap();
        Self {
            keeper: Alive::start(&machine, links.path(), 0),
            keepers: 1,
            holders: Vec::new(),
            clients: 0,
            before: FUNCTIONS.map(|name| machine.binding(name)).into(),
            links,
            machine,
        }
    }

    fn client(&mut self) -> Client {
        self.clients += 1;
        Client {
            id: self.clients,
            pid: 1000 + self.clients as i32,
        }
    }

    /// As this holder's keeper knows it, or another one's if that was killed.
    fn known_as(&mut self, at: usize) -> Client {
        match self.holders[at].keeper == self.keepers {
            true => self.holders[at].client,
            false => self.client(),
        }
    }

    fn next_keeper(&mut self) {
        fs::remove_file(&self.keeper.link).unwrap_or_default();
        self.keeper = Alive::start(&self.machine, self.links.path(), self.keepers);
        self.keepers += 1;
    }

    fn is_held(&self, name: &str) -> bool {
        self.holders.iter().any(|holder| holder.name == name)
    }

    /// What it is bound to while no keeper has it.
    fn before(&self, name: &str) -> &(Option<String>, String) {
        let at = FUNCTIONS.iter().position(|other| *other == name);
        &self.before[at.unwrap()]
    }

    fn is_as_before(&self, name: &str) -> bool {
        self.machine.binding(name) == *self.before(name)
            && !self.machine.records().contains(&name.to_owned())
    }

    fn pick(&self, number: usize) -> Option<usize> {
        number.checked_rem(self.holders.len())
    }

    fn act(&mut self, act: Act, steps: u32) {
        self.keeper.left.store(steps, Ordering::Relaxed);
        match act {
            Act::Open(function) => self.open(FUNCTIONS[function]),
            Act::Leave(number) => self.leave(number),
            Act::HoldOn(number) => self.hold_on(number),
            Act::Meddle(number) => self.meddle(number),
            Act::Die(number) => self.die(number),
            Act::Tend => self.tend(),
            Act::Record(function) => self.record(FUNCTIONS[function]),
            Act::Drive(function) => self.drive(function),
            Act::Next => self.next_keeper(),
        }
        if self.keeper.is_dead() {
            self.next_keeper();
        }
        self.keeper.left.store(NEVER, Ordering::Relaxed);
        for holder in &self.holders {
            assert!(self.machine.is_open(holder.name));
            let driver = self.machine.binding(holder.name).0;
            assert_eq!(driver.as_deref(), Some("vfio-pci"), "{}", holder.name);
        }
        for name in FUNCTIONS.into_iter().filter(|name| self.is_driven(name)) {
            let driver = self.machine.binding(name).0;
            assert_eq!(driver.as_deref(), Some("nvme"), "{name} is the host's own");
        }
    }

    fn open(&mut self, name: &'static str) {
        let client = self.client();
        let opened = self.keeper.holds.open(client, bdf(name));
        match opened {
            // Its answer may not have been sent: then the descriptors end with it.
            Ok(_) if self.keeper.is_dead() => {}
            Ok(opened) => {
                assert!(!self.is_held(name), "{name} is handed over twice");
                assert!(self.machine.is_bound(name));
                self.holders.push(Holder {
                    client,
                    name,
                    opened,
                    keeper: self.keepers,
                });
            }
            Err(_) if self.keeper.is_dead() => {}
            Err(refusal) => {
                let expected = match self.is_driven(name) {
                    true => ErrorCode::DriverBound,
                    false => ErrorCode::Busy,
                };
                assert_eq!(refusal.code, expected, "{refusal}");
                assert!(
                    self.is_held(name) || self.is_driven(name),
                    "{name} is nobody's: {refusal}"
                );
            }
        }
    }

    fn leave(&mut self, number: usize) {
        let Some(at) = self.pick(number) else {
            return;
        };
        let client = self.known_as(at);
        let holder = self.holders.remove(at);
        drop(holder.opened);
        let closed = self.keeper.holds.close(client, bdf(holder.name));
        if !self.keeper.is_dead() {
            closed.unwrap();
            assert!(self.is_as_before(holder.name), "{}", holder.name);
        }
    }

    fn hold_on(&mut self, number: usize) {
        let Some(at) = self.pick(number) else {
            return;
        };
        let client = self.known_as(at);
        let closed = self.keeper.holds.close(client, bdf(self.holders[at].name));
        if !self.keeper.is_dead() {
            let refused = closed.expect_err("what is open is not closed");
            assert_eq!(refused.code, ErrorCode::Busy, "{refused}");
        }
    }

    fn meddle(&mut self, number: usize) {
        let Some(at) = self.pick(number) else {
            return;
        };
        let other = self.client();
        let closed = self.keeper.holds.close(other, bdf(self.holders[at].name));
        if !self.keeper.is_dead() {
            closed.expect_err("what another one has is not closed");
        }
    }

    fn die(&mut self, number: usize) {
        let Some(at) = self.pick(number) else {
            return;
        };
        let Holder {
            client,
            name,
            opened,
            keeper,
        } = self.holders.remove(at);
        drop(opened);
        if keeper == self.keepers {
            self.keeper.holds.client_gone(client, bdf(name));
            assert!(self.keeper.is_dead() || self.is_as_before(name), "{name}");
        }
    }

    fn tend(&mut self) {
        for name in FUNCTIONS {
            self.keeper.holds.tend(bdf(name));
            if self.keeper.is_dead() {
                return;
            }
            assert!(self.is_held(name) || self.is_as_before(name), "{name}");
        }
    }

    fn is_driven(&self, name: &str) -> bool {
        self.before(name).0.as_deref() == Some("nvme")
    }

    fn drive(&mut self, function: usize) {
        let name = FUNCTIONS[function];
        let nobodys = (None, String::new());
        if self.is_driven(name) {
            fs::remove_file(self.machine.driver(name)).unwrap();
            self.before[function] = nobodys;
        } else if self.machine.binding(name) == nobodys {
            self.machine.bind_to(name, "nvme");
            self.before[function] = (Some("nvme".to_owned()), String::new());
        }
    }

    fn record(&mut self, name: &'static str) {
        let is_new = !self.machine.records().contains(&name.to_owned());
        if is_new && !self.is_driven(name) {
            let journal = Journal::open(&journal_folder(&self.machine.folder())).unwrap();
            let now = self.machine.sysfs().binding(bdf(name)).unwrap();
            journal.write(bdf(name), &now).unwrap();
            self.next_keeper();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn killed_anywhere_a_keeper_leaves_what_the_next_one_undoes(
        acts in vec(act(), 1..60),
    ) {
        let mut world = World::new();
        for (act, steps) in acts {
            world.act(act, steps);
        }
        while !world.holders.is_empty() {
            world.act(Act::Die(0), NEVER);
        }
        world.act(Act::Tend, NEVER);
        for name in FUNCTIONS {
            prop_assert!(world.is_as_before(name), "{} {:?}", name, world.machine.binding(name));
        }
        prop_assert_eq!(world.machine.records(), Vec::<String>::new());
    }
}
