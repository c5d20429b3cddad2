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
    Worker,
    Vmm,
    GuestKernel,
    Link,
    LenderHost,
    BorrowerHost,
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

pub const VICTIMS: [Victim; 12] = [
    Victim::LenderDaemon,
    Victim::BorrowerDaemon,
    Victim::LenderKeeper,
    Victim::BorrowerKeeper,
    Victim::LenderPort,
    Victim::BorrowerPort,
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
    /// It cannot be.
    Never(&'static str),
    /// It could be, and is not yet shown.
    Wanting(&'static str),
}

impl Cell {
    pub const fn plan(self) -> Plan {
        use {Deed::*, Plan::*, Stage::*, Victim::*};
        match (self.victim, self.stage, self.deed) {
            (Worker, Lend, _) => Never("there is no worker before a borrow"),
            (Vmm | GuestKernel, Lend | Borrow | Return, _) => {
                Never("there is no VMM before open or after detach")
            }
            (Vmm, Detach, _) => Never("a VMM that detaches is one that ends: killed under run"),
            (GuestKernel, _, Frozen) => Never("a kernel stands still with its VMM"),
            (GuestKernel, Open | Map | Detach, _) => {
                Never("the VMM of this stage has no guest: a kernel is killed under run")
            }
            (LenderHost | BorrowerHost, _, Frozen) => {
                Never("an emulated host gives the NTB up that does not answer a read within 5 s")
            }
            (LenderHost | BorrowerHost, _, Killed) => Wanting(
                "a host that boots again costs half a minute; `heartbeat` stops one instead",
            ),
            _ => Strike,
        }
    }

    /// Whether it costs only its own tenant: another one of the same port must not notice.
    pub const fn is_private(self) -> bool {
        use Victim::*;
        matches!(
            self.victim,
            LenderDaemon
                | BorrowerDaemon
                | LenderKeeper
                | BorrowerKeeper
                | Worker
                | Vmm
                | GuestKernel
        )
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

    /// Whether a new link session comes of it.
    pub const fn ends_session(self) -> bool {
        use Victim::*;
        match self.deed {
            Deed::Killed => matches!(self.victim, LenderPort | BorrowerPort | Link),
            Deed::Frozen => matches!(self.victim, Link),
        }
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
