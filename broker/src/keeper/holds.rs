//! What the keeper has bound, for whom, and how it is undone: at a word, at the client's end, or after the keeper's own.
//!
//! ```text
//! (nothing) --open--> Busy --bound--> Held by a connection --close, connection's end--> Busy --> (nothing)
//!                                     Held by nobody (found in the journal) --open--> Held by a connection
//! ```
//! An open that fails leaves what was nobody's so: it may be in use by a client of the last keeper.
//! Whoever moves an entry to Busy does the slow work without the lock, and wakes who waits.

use super::journal::Journal;
use crate::{
    config::Config,
    daemon::{
        refusals,
        vocabulary::{ErrorCode, VerbError},
    },
};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use vfio_shim::{
    model::{Bdf, Runtime},
    path::words,
    sysfs::{BindGuard, Sysfs},
    vfio::{Door, OpenError, OpenGroup},
};

/// The driver that functions are bound to, but for those whose own variant waits for more.
const DRIVER: &str = "vfio-pci";

/// What the keeper does its work on.
pub struct Ground {
    /// The folder that has `sys` and `dev`.
    pub top: PathBuf,
    /// The kernel's tree of functions.
    pub sysfs: Sysfs,
    /// Opens the group of a function.
    pub open: Box<Opener>,
}

/// Opens a group; busy as long as any descriptor or mapping of it is there.
pub type Opener = dyn Fn(Bdf, &Sysfs) -> Result<OpenGroup, OpenError> + Send + Sync;

impl Ground {
    /// This machine.
    pub fn of_the_kernel() -> Self {
        let door = Door::default();
        Self {
            top: PathBuf::from("/"),
            sysfs: Sysfs::default(),
            open: Box::new(move |bdf, sysfs| door.open(bdf, sysfs)),
        }
    }
}

/// How long is waited for others to let go.
#[derive(Clone, Copy, Debug)]
pub struct Waits {
    /// For a connection that has ended, or is about to be undone, before a function is refused.
    pub handover: Duration,
    /// For the last descriptor of a group, before `close` is refused, or a client's end is told.
    pub release: Duration,
    /// Between two looks whether a group is free: the kernel offers nothing to wait on.
    pub step: Duration,
    /// The same where nobody waits for it.
    pub idle_step: Duration,
}

impl Default for Waits {
    fn default() -> Self {
        Self {
            handover: Duration::from_secs(10),
            release: Duration::from_secs(5),
            step: Duration::from_millis(20),
            idle_step: Duration::from_secs(1),
        }
    }
}

/// Which connection, and which process is behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Client {
    pub(super) id: u64,
    pub(super) pid: i32,
}

enum Entry {
    /// Being bound, or given back.
    Busy,
    /// Bound; `None` = for a client of the last keeper.
    Held(Option<Client>, BindGuard),
}

/// Everything that is bound.
pub(super) struct Holds {
    config: Config,
    ground: Ground,
    journal: Journal,
    waits: Waits,
    runtime: Arc<dyn Runtime>,
    entries: Mutex<BTreeMap<Bdf, Entry>>,
    changed: Condvar,
}

/// An entry that is `Busy` for this thread; on drop it becomes what `then` says.
struct Turn<'a> {
    holds: &'a Holds,
    bdf: Bdf,
    then: Option<Entry>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut entries = self.holds.entries();
        match self.then.take() {
            Some(entry) => entries.insert(self.bdf, entry),
            None => entries.remove(&self.bdf),
        };
        self.holds.changed.notify_all();
    }
}

fn refuse(code: ErrorCode, text: impl Into<String>) -> VerbError {
    VerbError::new(code, text)
}

impl Holds {
    /// Takes over what the last keeper had bound.
    pub(super) fn new(
        config: Config,
        ground: Ground,
        journal: Journal,
        waits: Waits,
        runtime: Arc<dyn Runtime>,
    ) -> std::io::Result<Self> {
        let mut entries = BTreeMap::new();
        for (bdf, old) in journal.read()? {
            if !ground.sysfs.exists(bdf) {
                journal.remove(bdf);
                continue;
            }
            tracing::info!(%bdf, ?old, "bound by the last keeper");
            let guard = BindGuard::adopt(&ground.sysfs, bdf, old);
            entries.insert(bdf, Entry::Held(None, guard));
        }
        Ok(Self {
            config,
            ground,
            journal,
            waits,
            runtime,
            entries: Mutex::new(entries),
            changed: Condvar::new(),
        })
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<Bdf, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The allow-list: this host's ports, and what policy lets be lent.
    fn check_allowed(&self, bdf: Bdf) -> Result<(), VerbError> {
        let is_port = self.config.ports.iter().any(|port| port.bdf == bdf);
        if is_port {
            return Ok(());
        }
        if !self.config.may_lend(bdf) {
            let text = format!(
                "{bdf} is no port of the keeper's configuration, and its policy.allow does not \
                 name it: add it there, and restart the keeper"
            );
            return Err(refuse(ErrorCode::NotAllowed, text));
        }
        let lendable = self.ground.sysfs.check_lendable(bdf, false);
        lendable.map_err(|error| refusals::from_lend(&error))
    }

    /// Binds a function where it is not bound, and opens its group.
    pub(super) fn open(&self, client: Client, bdf: Bdf) -> Result<OpenGroup, VerbError> {
        self.check_allowed(bdf)?;
        let (mut turn, guard) = self.take_for(client, bdf)?;
        let is_orphan = guard.is_some();
        let guard = match guard {
            Some(guard) => match self.bind_again(bdf, &guard) {
                Ok(()) => guard,
                Err(refused) => {
                    turn.then = Some(Entry::Held(None, guard));
                    return Err(refused);
                }
            },
            None => self.bind(bdf)?,
        };
        match (self.ground.open)(bdf, &self.ground.sysfs) {
            Ok(opened) => {
                turn.then = Some(Entry::Held(Some(client), guard));
                tracing::info!(%bdf, pid = client.pid, "opened");
                Ok(opened)
            }
            Err(error) => {
                let refused = refusals::from_open(&error);
                // Nobody's function may be somebody's still: it is for `tend_orphans` to find out.
                match is_orphan || matches!(error, OpenError::Busy { .. }) {
                    true => turn.then = Some(Entry::Held(None, guard)),
                    false => self.restore(bdf, guard),
                }
                Err(refused)
            }
        }
    }

    /// The driver that this function is opened by.
    fn driver_for(&self, bdf: Bdf) -> Result<&'static str, VerbError> {
        let sysfs = &self.ground.sysfs;
        let ids = sysfs.ids(bdf);
        let is_xe = ids.and_then(|ids| sysfs.is_xe_vf(bdf, &ids));
        let is_xe = is_xe.map_err(|error| refusals::from_sysfs(&error))?;
        let variant = sysfs.xe_vfio_driver().filter(|_| is_xe);
        Ok(variant.unwrap_or(DRIVER))
    }

    /// The journal first: a keeper that is killed in between has written down what to undo.
    fn bind(&self, bdf: Bdf) -> Result<BindGuard, VerbError> {
        let sysfs = &self.ground.sysfs;
        let driver = self.driver_for(bdf)?;
        let old = sysfs.binding(bdf);
        let old = old.map_err(|error| refusals::from_sysfs(&error))?;
        self.journal.write(bdf, &old).map_err(|error| {
            let text = format!("the keeper cannot write down what {bdf} is bound to: {error}");
            refuse(ErrorCode::Kernel, text)
        })?;
        BindGuard::bind(sysfs, bdf, driver, false).map_err(|error| {
            // The guard has undone what it did.
            self.journal.remove(bdf);
            refusals::from_bind(&error)
        })
    }

    /// The last keeper may have been killed while it bound this, or gave it back.
    fn bind_again(&self, bdf: Bdf, guard: &BindGuard) -> Result<(), VerbError> {
        let bound = guard.bind_again(self.driver_for(bdf)?);
        bound.map_err(|error| refusals::from_bind(&error))
    }

    /// The entry for this client's use. One that another connection has is waited for a little: its
    /// client may have been killed this moment.
    fn take_for(
        &self,
        client: Client,
        bdf: Bdf,
    ) -> Result<(Turn<'_>, Option<BindGuard>), VerbError> {
        let mut whose = String::new();
        let taken = self.wait_for(Some(self.waits.handover), |entries| {
            let guard = match entries.remove(&bdf) {
                None => None,
                Some(Entry::Held(None, guard)) => Some(guard),
                Some(other) => {
                    whose = holder(&other);
                    entries.insert(bdf, other);
                    return None;
                }
            };
            entries.insert(bdf, Entry::Busy);
            Some(guard)
        });
        let Some(guard) = taken else {
            let text = format!(
                "the keeper has {bdf} {whose}: end that process, or wait until it has closed the \
                 function"
            );
            return Err(refuse(ErrorCode::Busy, text));
        };
        tracing::debug!(%bdf, id = client.id, "taken");
        let turn = Turn {
            holds: self,
            bdf,
            then: None,
        };
        Ok((turn, guard))
    }

    /// Waits until a look at what is bound finds something, at most so long.
    fn wait_for<R>(
        &self,
        wait: Option<Duration>,
        look: impl FnMut(&mut BTreeMap<Bdf, Entry>) -> Option<R>,
    ) -> Option<R> {
        let until_ms = wait.map(|wait| self.until_ms(wait));
        let shared = (&self.entries, &self.changed);
        self.runtime.wait_for(shared, until_ms, look)
    }

    fn until_ms(&self, wait: Duration) -> u64 {
        self.runtime.now_ms() + wait.as_millis() as u64
    }

    /// Stops a function that this client has open until its next reset; `false` = its PF's driver
    /// has no file for that.
    pub(super) fn stop(&self, client: Client, bdf: Bdf) -> Result<bool, VerbError> {
        let its = |owner: &Option<Client>| *owner == Some(client);
        let Some((mut turn, owner, guard)) = self.take_back(bdf, its) else {
            let text = format!("the keeper has {bdf} open for this connection no more: open it");
            return Err(refuse(ErrorCode::WrongState, text));
        };
        turn.then = Some(Entry::Held(owner, guard));
        let sysfs = &self.ground.sysfs;
        let file = sysfs.xe_stop(bdf);
        let Some(file) = file.map_err(|error| refusals::from_sysfs(&error))? else {
            return Ok(false);
        };
        let stopped = sysfs.stop_xe_vf(&file);
        stopped.map_err(|error| refusals::from_sysfs(&error))?;
        tracing::info!(%bdf, pid = client.pid, "stopped");
        Ok(true)
    }

    /// Gives a function back that this client has opened, or one whose client had the last keeper.
    /// The client has closed it; what is not closed in time is refused, and stays as it is.
    pub(super) fn close(&self, client: Client, bdf: Bdf) -> Result<(), VerbError> {
        let Some((turn, owner, guard)) = self.take_back(bdf, |owner| match owner {
            Some(owner) => *owner == client,
            None => true,
        }) else {
            return self.ensure_gone(bdf);
        };
        self.give_back(turn, owner, guard, Some(self.waits.release))
    }

    /// Nobody else's function is closed by this; one that is being given back is waited for.
    fn ensure_gone(&self, bdf: Bdf) -> Result<(), VerbError> {
        let mut whose = String::new();
        let gone = self.wait_for(Some(self.waits.handover), |entries| {
            match entries.get(&bdf) {
                None => Some(true),
                Some(entry) => {
                    whose = holder(entry);
                    matches!(entry, Entry::Held(..)).then_some(false)
                }
            }
        });
        if gone != Some(true) {
            let text = format!("the keeper has {bdf} {whose}: it is not yours");
            return Err(refuse(ErrorCode::WrongState, text));
        }
        Ok(())
    }

    fn take_back(
        &self,
        bdf: Bdf,
        may: impl Fn(&Option<Client>) -> bool,
    ) -> Option<(Turn<'_>, Option<Client>, BindGuard)> {
        let mut entries = self.entries();
        match entries.remove(&bdf) {
            Some(Entry::Held(owner, guard)) if may(&owner) => {
                entries.insert(bdf, Entry::Busy);
                let turn = Turn {
                    holds: self,
                    bdf,
                    then: None,
                };
                Some((turn, owner, guard))
            }
            other => {
                if let Some(other) = other {
                    entries.insert(bdf, other);
                }
                None
            }
        }
    }

    /// The connection has ended: what it had opened is undone, as soon as nobody has it any more.
    pub(super) fn client_gone(&self, client: Client, bdf: Bdf) {
        let its = |owner: &Option<Client>| *owner == Some(client);
        let Some((turn, owner, guard)) = self.take_back(bdf, its) else {
            return;
        };
        tracing::info!(%bdf, pid = client.pid, "its connection has ended");
        if let Err(error) = self.give_back(turn, owner, guard, None) {
            tracing::error!(%bdf, %error, "the function of a client that has gone");
        }
    }

    /// What is bound for no connection; waits until there is such a one.
    fn orphans(&self) -> Vec<Bdf> {
        let of_nobody = |(bdf, entry): (&Bdf, &Entry)| match entry {
            Entry::Held(None, _) => Some(*bdf),
            _ => None,
        };
        let found = self.wait_for(None, |entries| {
            let orphans: Vec<Bdf> = entries.iter().filter_map(of_nobody).collect();
            (!orphans.is_empty()).then_some(orphans)
        });
        found.unwrap_or_default()
    }

    /// For good: gives back what clients of the last keeper had, each as soon as nobody has it open
    /// any more. Those clients live on with what they hold, and may come back.
    pub(super) fn tend_orphans(&self) {
        loop {
            self.orphans().into_iter().for_each(|bdf| self.tend(bdf));
            self.sleep(self.waits.idle_step);
        }
    }

    fn sleep(&self, time: Duration) {
        self.runtime.sleep_until(self.until_ms(time));
    }

    /// Gives this one back, if it is bound for no connection and nobody has it open.
    pub(super) fn tend(&self, bdf: Bdf) {
        if let Some((turn, owner, guard)) = self.take_back(bdf, Option::is_none) {
            // Refused = still open, and that is how it should be.
            let given = self.give_back(turn, owner, guard, Some(Duration::ZERO));
            tracing::debug!(%bdf, ?given, "a function that the last keeper had bound");
        }
    }

    /// Waits until nobody has the group open, then restores what was. Within `wait`, or for ever.
    fn give_back(
        &self,
        mut turn: Turn<'_>,
        owner: Option<Client>,
        guard: BindGuard,
        wait: Option<Duration>,
    ) -> Result<(), VerbError> {
        let bdf = turn.bdf;
        let until_ms = self.until_ms(wait.unwrap_or(self.waits.release));
        let mut told = false;
        while let Err(error) = self.ensure_free(bdf) {
            let late = self.runtime.now_ms() >= until_ms;
            if late && wait.is_some() {
                turn.then = Some(Entry::Held(owner, guard));
                return Err(refusals::from_open(&error));
            }
            if late && !told {
                told = true;
                let error = words(&error);
                tracing::error!(%bdf, error, "its process has gone, and it cannot be given back yet");
            }
            let step = if told {
                self.waits.idle_step
            } else {
                self.waits.step
            };
            self.sleep(step);
        }
        match guard.give_back() {
            Ok(()) => {
                self.journal.remove(bdf);
                tracing::info!(%bdf, "given back");
                Ok(())
            }
            Err(error) => {
                // Its record stays: somebody may look at it, and the next keeper tries again.
                tracing::error!(%bdf, "{}", words(&error));
                Err(refuse(ErrorCode::Kernel, words(&error)))
            }
        }
    }

    /// Says that nobody has the group open. What does not say so is no yes: an unbinding would
    /// take the function from under its holder, and wait for it.
    fn ensure_free(&self, bdf: Bdf) -> Result<(), OpenError> {
        match (self.ground.open)(bdf, &self.ground.sysfs) {
            Ok(_) | Err(OpenError::NotVfio { .. }) => Ok(()),
            Err(_) if !self.ground.sysfs.exists(bdf) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn restore(&self, bdf: Bdf, guard: BindGuard) {
        match guard.give_back() {
            Ok(()) => self.journal.remove(bdf),
            Err(error) => tracing::error!(%bdf, "{}", words(&error)),
        }
    }
}

fn holder(entry: &Entry) -> String {
    match entry {
        Entry::Held(Some(client), _) => format!("open for process {}", client.pid),
        Entry::Held(None, _) => "open for a process of before its own start".to_owned(),
        Entry::Busy => "under way to or from another process".to_owned(),
    }
}
