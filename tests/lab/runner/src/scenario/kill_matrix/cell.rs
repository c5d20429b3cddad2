//! The cells of the kill matrix: who is struck, at which stage, how, and which of them cannot be.

/// Who is struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    LenderDaemon,
    BorrowerDaemon,
    LenderKeeper,
    BorrowerKeeper,
    LenderPort,
    BorrowerPort,
    LenderWarden,
    BorrowerWarden,
    Worker,
    Vmm,
    GuestKernel,
    Link,
    LenderHost,
    BorrowerHost,
}

/// Whose port the witness of a cell goes through: it must not notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Witnessed {
    /// The same ports as the tenant who is struck.
    Beside,
    /// Another one of the lender, to a third host.
    FromLender,
    /// Another one of the borrower, to a third host.
    FromBorrower,
}

/// What is under way then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// `add` and `available`.
    Lend,
    /// `borrow`: the lease, its path, its worker.
    Borrow,
    /// A VMM connects, asks, and reads registers.
    Open,
    /// It maps its memory, takes the function as bus master, and makes queues.
    Map,
    /// A guest's stock driver writes.
    Run,
    /// The VMM ends.
    Detach,
    /// `return`.
    Return,
}

/// What is done at a stage while the strike comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    Lend,
    Borrow,
    Open,
    Map,
    Run,
    /// A VMM ends at once, and leaves its function running: others have all the undoing to do.
    End,
    /// A VMM takes its function apart, step by step.
    Leave,
    /// A guest's kernel powers its machine off.
    ShutDown,
    Return,
}

/// What both hosts say of the function, once they agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truth {
    /// There is no lease.
    Nobodys,
    /// There was one: the borrower says why it is over, until it is returned.
    Lost,
    /// A lease is in force, and its socket waits for a VMM.
    Waiting,
    /// A lease is in force, and a VMM has the function.
    Connected,
}

/// What is done to the victim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    Killed,
    Frozen,
}

pub const VICTIMS: [Victim; 14] = [
    Victim::LenderDaemon,
    Victim::BorrowerDaemon,
    Victim::LenderKeeper,
    Victim::BorrowerKeeper,
    Victim::LenderPort,
    Victim::BorrowerPort,
    Victim::LenderWarden,
    Victim::BorrowerWarden,
    Victim::Worker,
    Victim::Vmm,
    Victim::GuestKernel,
    Victim::Link,
    Victim::LenderHost,
    Victim::BorrowerHost,
];
pub const STAGES: [Stage; 7] = [
    Stage::Lend,
    Stage::Borrow,
    Stage::Open,
    Stage::Map,
    Stage::Run,
    Stage::Detach,
    Stage::Return,
];
pub const DEEDS: [Deed; 2] = [Deed::Killed, Deed::Frozen];

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    pub victim: Victim,
    pub stage: Stage,
    pub deed: Deed,
}

/// Whether a cell is struck, and if not, why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    Strike,
    /// It cannot be, or is not tried.
    Never(&'static str),
}

impl Cell {
    /// For an operation that nobody disturbs: what comes of it is a success, and its host stays.
    pub const UNDISTURBED: Self = Cell {
        victim: Victim::LenderDaemon,
        stage: Stage::Lend,
        deed: Deed::Killed,
    };

    /// As its line in the scenario's output has it.
    pub fn name(self) -> String {
        let Cell {
            victim,
            stage,
            deed,
        } = self;
        format!("{victim:?} {deed:?} at {stage:?}").to_lowercase()
    }

    /// Which of all it is, for a moment of its own.
    pub fn index(self) -> u64 {
        Cell::all().position(|one| one == self).unwrap_or_default() as u64
    }

    pub const fn plan(self) -> Plan {
        use {Deed::*, Plan::*, Stage::*, Victim::*};
        match (self.victim, self.stage, self.deed) {
            (Worker, Lend, _) => Never("there is no worker before a borrow"),
            (Vmm | GuestKernel, Lend | Borrow | Return, _) => {
                Never("there is no VMM before open or after detach")
            }
            (GuestKernel, _, Frozen) => Never("a kernel stands still with its VMM"),
            (GuestKernel, Open, _) => {
                Never("a VMM connects and asks before its guest's first instruction")
            }
            (GuestKernel, Map, _) => {
                Never("not tried: this stage's VMM drives the function itself and has no guest")
            }
            (LenderWarden, _, _) => {
                Never("not tried: a lender's warden holds nothing of what is lent")
            }
            (LenderHost | BorrowerHost, _, Frozen) => {
                Never("a host is no process, and nothing stops all of it but its power")
            }
            _ => Strike,
        }
    }

    /// What is under way. Whoever detaches is struck at what takes a while; else a VMM's end is
    /// the least that anybody can do for those who undo.
    pub const fn work(self) -> Work {
        match (self.stage, self.victim) {
            (Stage::Lend, _) => Work::Lend,
            (Stage::Borrow, _) => Work::Borrow,
            (Stage::Open, _) => Work::Open,
            (Stage::Map, _) => Work::Map,
            (Stage::Run, _) => Work::Run,
            (Stage::Detach, Victim::Vmm) => Work::Leave,
            (Stage::Detach, Victim::GuestKernel) => Work::ShutDown,
            (Stage::Detach, _) => Work::End,
            (Stage::Return, _) => Work::Return,
        }
    }

    /// What the hosts may say when all is back, by whether the stage's operation said that it was
    /// done. Where it did not, as a verb whose daemon is killed does not, a verb is told to its port
    /// or is not: the port does to its end what it was told, and nobody does the rest.
    pub const fn may_end_in(self, done: bool) -> &'static [Truth] {
        use {Stage::*, Truth::*};
        match (self.stage, done, self.fate()) {
            // Nobody has it yet, or any more, whatever became of the verb.
            (Lend, ..) | (Return, true, _) => &[Nobodys],
            // A borrow that fails gives back what it had, and leaves no lease behind to be lost.
            (Borrow, false, Nobodys | Lost) => &[Nobodys],
            (Borrow | Return, false, Waiting) => &[Nobodys, Waiting],
            (Return, false, Lost) => &[Nobodys, Lost],
            (Open | Map, _, Connected) if self.asks_too_long() => &[Waiting, Connected],
            (_, _, Nobodys) => &[Nobodys],
            (_, _, Lost) => &[Lost],
            (_, _, Waiting) => &[Waiting],
            (_, _, Connected) => &[Connected],
        }
    }

    /// What those who are left may say while nobody is back, and the stage's operation goes on: as
    /// [`Cell::may_end_in`], but that a borrower who has forgotten its leases does not say so yet.
    pub const fn may_be_told(self) -> &'static [Truth] {
        use {Stage::*, Truth::*};
        match (self.stage, self.fate()) {
            (Lend, _) => &[Nobodys],
            (Borrow | Return, Nobodys | Lost) => &[Nobodys, Lost],
            (_, Nobodys | Lost) => &[Lost],
            _ => self.may_end_in(true),
        }
    }

    /// What becomes of a lease in force.
    const fn fate(self) -> Truth {
        use {Deed::*, Stage::*, Truth::*, Victim::*};
        match (self.victim, self.stage, self.deed) {
            // Whoever held it begins anew, and knows of none.
            (BorrowerPort | BorrowerWarden | BorrowerHost, _, Killed) => Nobodys,
            // A VMM's end is not its lease's.
            (Vmm | GuestKernel, _, Killed) => Waiting,
            _ if !self.is_survived() => Lost,
            (_, Open | Map | Run, _) => Connected,
            _ => Waiting,
        }
    }

    /// Whether a tenant may be told of it though its path lives: ports are asked with a limit of
    /// 4 s, as QEMU waits for 5; wardens with one of 5.
    pub const fn asks_too_long(self) -> bool {
        use Victim::*;
        matches!(self.victim, LenderPort | BorrowerPort | BorrowerWarden)
    }

    /// Where its witness is: beside the tenant where only that one is to be struck, at another
    /// port of a host that stays else.
    pub const fn witnessed(self) -> Witnessed {
        use Victim::*;
        match (self.victim, self.deed) {
            (LenderHost, _) => Witnessed::FromBorrower,
            (LenderPort | BorrowerPort | Link | BorrowerHost, _)
            | (BorrowerWarden, Deed::Killed) => Witnessed::FromLender,
            _ => Witnessed::Beside,
        }
    }

    /// Whether the path lives through it.
    pub const fn is_survived(self) -> bool {
        use Victim::*;
        match self.deed {
            Deed::Frozen => !matches!(self.victim, Link),
            Deed::Killed => matches!(
                self.victim,
                LenderDaemon | BorrowerDaemon | LenderKeeper | BorrowerKeeper
            ),
        }
    }

    /// Whether the victim is a process that a supervisor starts.
    pub const fn is_supervised(self) -> bool {
        use Victim::*;
        matches!(
            self.victim,
            LenderDaemon
                | BorrowerDaemon
                | LenderKeeper
                | BorrowerKeeper
                | LenderPort
                | BorrowerPort
        )
    }

    /// Whether a new link session comes of it. A port whose warden is killed is started again.
    pub const fn ends_session(self) -> bool {
        use Victim::*;
        match self.deed {
            Deed::Killed => matches!(
                self.victim,
                LenderPort | BorrowerPort | BorrowerWarden | Link | LenderHost | BorrowerHost
            ),
            Deed::Frozen => matches!(self.victim, Link),
        }
    }

    /// Whether the stage's operation goes with the host that is struck.
    pub const fn ends_operation(self) -> bool {
        matches!(
            (self.victim, self.stage),
            (Victim::LenderHost, Stage::Lend)
                | (
                    Victim::BorrowerHost,
                    Stage::Borrow
                        | Stage::Open
                        | Stage::Map
                        | Stage::Run
                        | Stage::Detach
                        | Stage::Return
                )
        )
    }

    /// All of them, in the order of the table.
    pub fn all() -> impl Iterator<Item = Cell> {
        VICTIMS.into_iter().flat_map(|victim| {
            DEEDS.into_iter().flat_map(move |deed| {
                STAGES.into_iter().map(move |stage| Cell {
                    victim,
                    stage,
                    deed,
                })
            })
        })
    }

    /// How many are struck.
    pub const fn struck() -> usize {
        let (mut count, mut index) = (0, 0);
        while index < VICTIMS.len() * DEEDS.len() * STAGES.len() {
            let cell = Cell {
                victim: VICTIMS[index / (DEEDS.len() * STAGES.len())],
                deed: DEEDS[index / STAGES.len() % DEEDS.len()],
                stage: STAGES[index % STAGES.len()],
            };
            if matches!(cell.plan(), Plan::Strike) {
                count += 1;
            }
            index += 1;
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::{Cell, Deed, Plan, Stage, Truth, Victim};

    #[test]
    fn every_struck_cell_is_counted_once() {
        let struck = Cell::all().filter(|cell| cell.plan() == Plan::Strike);
        assert_eq!(struck.count(), Cell::struck());
    }

    fn ends(victim: Victim, stage: Stage, deed: Deed) -> [&'static [Truth]; 3] {
        let cell = Cell {
            victim,
            stage,
            deed,
        };
        let [done, not_done] = [true, false].map(|done| cell.may_end_in(done));
        [done, not_done, cell.may_be_told()]
    }

    #[test]
    fn each_cell_says_what_it_may_end_in() {
        use {Deed::*, Stage::*, Truth::*, Victim::*};
        let [nobodys, lost, waiting, connected]: [&[Truth]; 4] =
            [&[Nobodys], &[Lost], &[Waiting], &[Connected]];
        let either: &[Truth] = &[Nobodys, Lost];
        for (victim, stage, deed, expected) in [
            // Nobody's before a borrow and after a return, whoever dies.
            (LenderPort, Lend, Killed, [nobodys; 3]),
            (BorrowerHost, Lend, Killed, [nobodys; 3]),
            (Worker, Return, Killed, [nobodys, either, either]),
            // A path that dies takes its lease with it.
            (Worker, Run, Killed, [lost; 3]),
            (LenderPort, Open, Killed, [lost; 3]),
            (LenderHost, Detach, Killed, [lost; 3]),
            (Link, Map, Frozen, [lost; 3]),
            (Link, Borrow, Killed, [lost, nobodys, either]),
            // The borrower's side begins anew without it.
            (BorrowerPort, Run, Killed, [nobodys, nobodys, lost]),
            (BorrowerWarden, Open, Killed, [nobodys, nobodys, lost]),
            // A VMM's death is no end of a lease.
            (Vmm, Map, Killed, [waiting; 3]),
            (Vmm, Detach, Killed, [waiting; 3]),
            (GuestKernel, Run, Killed, [waiting; 3]),
            (GuestKernel, Detach, Killed, [waiting; 3]),
            // What a path lives through.
            (BorrowerDaemon, Run, Killed, [connected; 3]),
            (LenderPort, Run, Frozen, [connected; 3]),
            (Worker, Map, Frozen, [connected; 3]),
            (Vmm, Detach, Frozen, [waiting; 3]),
            (LenderKeeper, Detach, Killed, [waiting; 3]),
        ] {
            assert_eq!(
                ends(victim, stage, deed),
                expected,
                "{victim:?} {stage:?} {deed:?}"
            );
        }
        // Under way a verb's port was told of it, or was not.
        let [done, cut_off, _] = ends(BorrowerDaemon, Borrow, Killed);
        assert_eq!((done, cut_off), (waiting, &[Nobodys, Waiting][..]));
        let [_, told_late, _] = ends(LenderPort, Open, Frozen);
        assert_eq!(told_late, [Waiting, Connected]);
    }

    #[test]
    fn no_cell_may_end_in_anything_at_all() {
        for cell in Cell::all() {
            for told in [true, false].map(|done| cell.may_end_in(done)) {
                assert!((1..=2).contains(&told.len()), "{}: {told:?}", cell.name());
            }
        }
    }
}
