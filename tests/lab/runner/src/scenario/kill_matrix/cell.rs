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
    /// A stage whose operation nobody disturbs: what comes of it is a success.
    pub const fn undisturbed(stage: Stage) -> Self {
        Cell {
            victim: VICTIMS[0],
            stage,
            deed: DEEDS[0],
        }
    }

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
            (Vmm, Detach, _) => {
                Never("not tried: this stage's VMM ends at once, and is struck under map and run")
            }
            (GuestKernel, _, Frozen) => Never("a kernel stands still with its VMM"),
            (GuestKernel, Open | Map | Detach, _) => {
                Never("not tried: the VMM here has no guest; a kernel is killed under run")
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
    use super::{Cell, Plan};

    #[test]
    fn every_struck_cell_is_counted_once() {
        let struck = Cell::all().filter(|cell| cell.plan() == Plan::Strike);
        assert_eq!(struck.count(), Cell::struck());
    }
}
