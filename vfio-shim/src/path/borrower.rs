//! The borrower's end of all paths of a port: leases held, guest RAM behind the own window, and the steps of each call; pure.
//!
//! A call of a worker or a verb is a short walk of steps, each ended by a reply of the peer or by
//! the mapper. `map` is: slices -> pin -> tell the lender -> answer. `unmap` is: unpin -> answer
//! (that makes the memory safe) -> tell the lender -> free the slices.

use super::message::{
    ENTRIES_MAX, LeaseId, MapRange, PoolEntry, RANGES_MAX, Refusal, RemoteFunction, Reply, Request,
    Secret,
};
use super::plan::{Owner, Rows, SlicePool};
use crate::model::{Access, Bdf, Span, WindowOffset};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::{os::fd::OwnedFd, sync::Arc};

/// How many functions one port borrows at most.
pub const LEASES_MAX: usize = 64;
/// How many calls may be under way at once.
pub const CALLS_MAX: usize = 256;
/// How many guest memory mappings one lease may hold.
pub const MAPS_MAX: usize = 65_535;
/// Config space is fetched in pieces of this many bytes.
const CONFIG_PIECE: u16 = 2048;

/// Names a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// A piece of guest RAM, and the memory fd behind it.
#[derive(Clone, Debug)]
pub struct GuestMap {
    /// Guest-physical addresses.
    pub span: Span,
    /// What the function may do.
    pub access: Access,
    /// The memory.
    pub fd: Arc<OwnedFd>,
    /// Offset of the first byte in it.
    pub fd_offset: u64,
}

/// What a worker or a verb asks for.
#[derive(Debug)]
pub enum Call {
    /// The peer's pool.
    List,
    /// Borrow, reserving so many bytes of the window for guest RAM.
    Borrow(Bdf, Option<u64>),
    /// Open the path of a lease.
    Open(LeaseId),
    /// End a lease; the path is undone first.
    Return(LeaseId),
    /// Map guest RAM.
    Map(LeaseId, Vec<GuestMap>),
    /// Unmap all that lies within the span.
    Unmap(LeaseId, Span),
    /// Anything that the lender does at once.
    Forward(LeaseId, Request),
}

/// What a call gave.
#[derive(Debug)]
pub enum Answer {
    /// Done.
    Done,
    /// The pool.
    List(Vec<PoolEntry>),
    /// A lease.
    Borrowed(LeaseId, PoolEntry),
    /// An open path.
    Opened(Box<OpenedPath>),
    /// Bytes of a register or of config space.
    Bytes(Vec<u8>),
    /// So many bytes were unmapped.
    Unmapped(u64),
}

/// What a worker needs to know of an open path.
#[derive(Clone, Debug)]
pub struct OpenedPath {
    /// The function as the lender tells it.
    pub function: RemoteFunction,
    /// Its config space as the lender's VFIO shows it.
    pub config: Vec<u8>,
}

/// Why a call failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    /// There is no open link session, or it ended.
    #[error("{0}")]
    Gone(String),
    /// The peer, or this side, refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Mapping these addresses is refused here.
    #[error("guest memory {0} is mapped already, or would cut a mapping in two")]
    Overlap(Span),
    /// Not answered in time.
    #[error("not answered within {0} ms: the other host is slow or gone")]
    Timeout(u64),
    /// The kernel refused to pin.
    #[error("pinning guest memory failed: {0}")]
    Pin(String),
}

/// One piece of guest RAM to be mapped into the port's own container.
#[derive(Clone, Debug)]
pub struct Pin {
    /// Where in the own window.
    pub offset: WindowOffset,
    /// The guest RAM.
    pub map: GuestMap,
}

/// A slice of the own window: where, and how many bytes.
pub type Slice = (WindowOffset, u64);

/// What the driver has to do.
#[derive(Debug)]
pub enum BorrowerAction {
    /// Send a request; the reply comes to `reply` with the same step.
    Send(Step, Request),
    /// Map into the port's container; all or none; answered by `pinned`.
    Pin(Step, Vec<Pin>),
    /// Unmap from the port's container; answered by `pinned`.
    Unpin(Step, Vec<Slice>),
    /// Scan these words of the interrupt table for the lease, from zero.
    Scan(LeaseId, u32, u32),
    /// Scan them no more.
    ScanEnd(LeaseId),
    /// Answer a call.
    Answer(Token, Result<Answer, CallError>),
    /// The lease is over: its worker reads ones from now on.
    Lost(LeaseId, String),
}

/// Names a step under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Step(pub u64);

#[derive(Clone, Debug)]
struct Mapped {
    offset: WindowOffset,
    len: u64,
    access: Access,
    live: bool,
}

struct Lease {
    bdf: Bdf,
    secret: Secret,
    irq_count: u32,
    closing: bool,
    maps: BTreeMap<u64, Mapped>,
    /// Unmapped here, not told to the lender yet; one message of them is under way at a time.
    untold: VecDeque<Taken>,
    telling: bool,
    /// Maps that are pinned and wait for that, so that the lender hears all in order.
    pinned: VecDeque<(Option<Token>, Vec<u64>)>,
}

/// A mapping that was taken out: its guest-physical addresses and its slice.
type Taken = (Span, Slice);

enum Op {
    List {
        entries: Vec<PoolEntry>,
    },
    Borrow {
        ram: Option<u64>,
    },
    Open {
        lease: LeaseId,
    },
    Config {
        lease: LeaseId,
        opened: Box<OpenedPath>,
    },
    Return {
        lease: LeaseId,
    },
    ReturnUnpin {
        lease: LeaseId,
    },
    MapPin {
        lease: LeaseId,
        starts: Vec<u64>,
    },
    MapTell {
        lease: LeaseId,
        starts: Vec<u64>,
        rest: VecDeque<Vec<MapRange>>,
        told: Vec<Span>,
    },
    MapUndo {
        lease: LeaseId,
        starts: Vec<u64>,
        cause: CallError,
    },
    Unpin {
        lease: LeaseId,
        taken: Vec<Taken>,
    },
    UnmapTell {
        lease: LeaseId,
        freed: Vec<Slice>,
    },
    Forward,
    RevokedUnpin {
        lease: LeaseId,
    },
    SessionUnpin,
}

/// The borrower's end of all paths of a port.
#[derive(Default)]
pub struct Borrower {
    leases: BTreeMap<LeaseId, Lease>,
    steps: HashMap<Step, (Option<Token>, Op)>,
    step_last: u64,
    rows: Rows,
}

/// What `status` tells of one lease.
#[derive(Clone, Debug)]
pub struct LeaseStatus {
    /// The lease.
    pub lease: LeaseId,
    /// The function, on the lender.
    pub bdf: Bdf,
    /// Live mappings of guest RAM.
    pub maps: usize,
    /// Bytes of them.
    pub mapped_bytes: u64,
}

type Actions = Vec<BorrowerAction>;

fn answer(token: Option<Token>, result: Result<Answer, CallError>) -> Actions {
    token
        .map(|token| BorrowerAction::Answer(token, result))
        .into_iter()
        .collect()
}

impl Borrower {
    /// What `status` tells.
    pub fn status(&self) -> Vec<LeaseStatus> {
        let of = |(lease, held): (&LeaseId, &Lease)| LeaseStatus {
            lease: *lease,
            bdf: held.bdf,
            maps: held.maps.values().filter(|map| map.live).count(),
            mapped_bytes: held
                .maps
                .values()
                .filter(|map| map.live)
                .map(|map| map.len)
                .sum(),
        };
        self.leases.iter().map(of).collect()
    }

    /// A call of a worker or a verb, while a link session is open.
    pub fn call(&mut self, token: Token, call: Call, pool: &mut SlicePool) -> Actions {
        if self.steps.len() >= CALLS_MAX {
            let text = format!("{CALLS_MAX} calls are under way: wait for one to end");
            return answer(Some(token), Err(CallError::Gone(text)));
        }
        let begun = match call {
            Call::List => {
                let op = Op::List {
                    entries: Vec::new(),
                };
                Ok(self.send(Some(token), op, Request::List { cursor: 0 }))
            }
            Call::Borrow(bdf, ram) => self.borrow(token, bdf, ram),
            Call::Open(lease) => self.open(token, lease),
            Call::Return(lease) => self.give_back(token, lease),
            Call::Map(lease, maps) => self.map(token, lease, maps, pool),
            Call::Unmap(lease, span) => self.unmap(token, lease, span),
            Call::Forward(lease, request) => self
                .held(lease)
                .map(|_| ())
                .map(|()| self.send(Some(token), Op::Forward, request)),
        };
        begun.unwrap_or_else(|error| answer(Some(token), Err(error)))
    }

    fn held(&mut self, lease: LeaseId) -> Result<&mut Lease, CallError> {
        let gone = || CallError::Gone(format!("lease {lease} is over: borrow the function again"));
        self.leases
            .get_mut(&lease)
            .filter(|held| !held.closing)
            .ok_or_else(gone)
    }

    fn step(&mut self, token: Option<Token>, op: Op) -> Step {
        self.step_last += 1;
        let step = Step(self.step_last);
        self.steps.insert(step, (token, op));
        step
    }

    fn send(&mut self, token: Option<Token>, op: Op, request: Request) -> Actions {
        let step = self.step(token, op);
        vec![BorrowerAction::Send(step, request)]
    }

    fn borrow(&mut self, token: Token, bdf: Bdf, ram: Option<u64>) -> Result<Actions, CallError> {
        if self.leases.len() >= LEASES_MAX {
            let text = format!("a port borrows at most {LEASES_MAX} functions: return one first");
            return Err(CallError::Gone(text));
        }
        Ok(self.send(Some(token), Op::Borrow { ram }, Request::Borrow { bdf }))
    }

    fn open(&mut self, token: Token, lease: LeaseId) -> Result<Actions, CallError> {
        let count = self.held(lease)?.irq_count;
        let first = self.rows.allocate(lease, count)?;
        let held = self.held(lease)?;
        let (secret, irq_count) = (held.secret, count);
        let mut actions = vec![BorrowerAction::Scan(lease, first, count)];
        let request = Request::Open {
            lease,
            secret,
            irq_first: first,
            irq_count,
        };
        actions.extend(self.send(Some(token), Op::Open { lease }, request));
        Ok(actions)
    }

    fn give_back(&mut self, token: Token, lease: LeaseId) -> Result<Actions, CallError> {
        let held = self.held(lease)?;
        // From here on the lease takes no call; a map under way finds its entry gone.
        held.closing = true;
        let taken = held.take_all();
        let step = self.step(Some(token), Op::ReturnUnpin { lease });
        Ok(vec![BorrowerAction::Unpin(step, taken)])
    }

    fn map(
        &mut self,
        token: Token,
        lease: LeaseId,
        maps: Vec<GuestMap>,
        pool: &mut SlicePool,
    ) -> Result<Actions, CallError> {
        let held = self.held(lease)?;
        held.check_new(&maps)?;
        let mut pins = Vec::with_capacity(maps.len());
        let mut starts = Vec::with_capacity(maps.len());
        // The large ones first: they have the most to gain from an offset that agrees with the
        // guest-physical address modulo 1 GiB.
        let mut order: Vec<GuestMap> = maps;
        order.sort_by_key(|map| std::cmp::Reverse(map.span.len()));
        for map in order {
            let (start, len, access) = (map.span.start(), map.span.len(), map.access);
            let offset = match pool.allocate_ram(Owner::Borrowed(lease), map.span) {
                Ok(offset) => offset,
                Err(refusal) => {
                    held.forget(&starts, lease, pool);
                    return Err(refusal.into());
                }
            };
            held.maps.insert(
                start,
                Mapped {
                    offset,
                    len,
                    access,
                    live: false,
                },
            );
            starts.push(start);
            pins.push(Pin { offset, map });
        }
        let step = self.step(Some(token), Op::MapPin { lease, starts });
        Ok(vec![BorrowerAction::Pin(step, pins)])
    }

    fn unmap(&mut self, token: Token, lease: LeaseId, span: Span) -> Result<Actions, CallError> {
        let taken = self.held(lease)?.take_within(span)?;
        if taken.is_empty() {
            return Ok(answer(Some(token), Ok(Answer::Unmapped(0))));
        }
        let slices = taken.iter().map(|(_, slice)| *slice).collect();
        let step = self.step(Some(token), Op::Unpin { lease, taken });
        Ok(vec![BorrowerAction::Unpin(step, slices)])
    }

    /// The mapper has pinned or unpinned.
    pub fn pinned(
        &mut self,
        step: Step,
        result: Result<(), CallError>,
        pool: &mut SlicePool,
    ) -> Actions {
        let Some((token, op)) = self.steps.remove(&step) else {
            return Vec::new();
        };
        match (op, result) {
            (Op::MapPin { lease, starts }, Ok(())) => self.tell(token, lease, starts),
            (Op::MapPin { lease, starts }, Err(error)) => {
                if let Some(held) = self.leases.get_mut(&lease) {
                    held.forget(&starts, lease, pool);
                }
                answer(token, Err(error))
            }
            (
                Op::MapUndo {
                    lease,
                    starts,
                    cause,
                },
                _,
            ) => {
                if let Some(held) = self.leases.get_mut(&lease) {
                    held.forget(&starts, lease, pool);
                }
                answer(token, Err(cause))
            }
            (Op::Unpin { lease, taken }, result) => {
                let bytes = taken.iter().map(|(span, _)| span.len()).sum();
                let mut actions = answer(token, result.map(|()| Answer::Unmapped(bytes)));
                if let Some(held) = self.leases.get_mut(&lease) {
                    held.untold.extend(taken);
                }
                actions.extend(self.tell_next(lease));
                actions
            }
            (Op::ReturnUnpin { lease }, _) => {
                self.send(token, Op::Return { lease }, Request::Return { lease })
            }
            (Op::RevokedUnpin { lease }, _) => {
                // The lender had unmapped all before it told us.
                pool.free_all(Owner::Borrowed(lease));
                Vec::new()
            }
            (_, result) => answer(token, result.map(|()| Answer::Done)),
        }
    }

    /// The next thing that the lender has to hear of a lease: unmaps first, as many as one message
    /// takes, then the maps that waited for them.
    fn tell_next(&mut self, lease: LeaseId) -> Actions {
        let Some(held) = self.leases.get_mut(&lease) else {
            return Vec::new();
        };
        if held.telling {
            return Vec::new();
        }
        if held.untold.is_empty() {
            let pinned = std::mem::take(&mut held.pinned);
            let tell = |(token, starts)| self.tell_map(token, lease, starts);
            return pinned.into_iter().flat_map(tell).collect();
        }
        held.telling = true;
        let count = held.untold.len().min(RANGES_MAX);
        let (spans, freed) = held.untold.drain(..count).unzip();
        self.send(
            None,
            Op::UnmapTell { lease, freed },
            Request::Unmap { lease, spans },
        )
    }

    fn unmap_told(&mut self, lease: LeaseId, freed: Vec<Slice>, pool: &mut SlicePool) -> Actions {
        for (offset, _) in freed {
            pool.free(Owner::Borrowed(lease), offset);
        }
        if let Some(held) = self.leases.get_mut(&lease) {
            held.telling = false;
        }
        self.tell_next(lease)
    }

    fn tell(&mut self, token: Option<Token>, lease: LeaseId, starts: Vec<u64>) -> Actions {
        match self.leases.get_mut(&lease) {
            Some(held) => held.pinned.push_back((token, starts)),
            None => return answer(token, Err(CallError::Gone("the lease is over".into()))),
        }
        self.tell_next(lease)
    }

    fn tell_map(&mut self, token: Option<Token>, lease: LeaseId, starts: Vec<u64>) -> Actions {
        let Some(held) = self.leases.get_mut(&lease) else {
            return answer(token, Err(CallError::Gone("the lease is over".into())));
        };
        let mut sorted = starts.clone();
        sorted.sort_unstable();
        let range = |start: &u64| {
            let map = held.maps.get(start)?;
            let span = Span::new(*start, map.len)?;
            Some(MapRange {
                span,
                offset: map.offset,
                access: map.access,
            })
        };
        let ranges: Vec<MapRange> = sorted.iter().filter_map(range).collect();
        let mut rest: VecDeque<Vec<MapRange>> = ranges
            .chunks(RANGES_MAX)
            .map(<[MapRange]>::to_vec)
            .collect();
        let Some(ranges) = rest.pop_front() else {
            return answer(token, Ok(Answer::Done));
        };
        let told = ranges.iter().map(|range| range.span).collect();
        let op = Op::MapTell {
            lease,
            starts,
            rest,
            told,
        };
        self.send(token, op, Request::Map { lease, ranges })
    }

    /// The peer has answered.
    pub fn reply(
        &mut self,
        step: Step,
        result: Result<Reply, Refusal>,
        pool: &mut SlicePool,
    ) -> Actions {
        let Some((token, op)) = self.steps.remove(&step) else {
            return Vec::new();
        };
        match (op, result) {
            (
                Op::List { entries },
                Ok(Reply::List {
                    next,
                    entries: more,
                }),
            ) => self.listed(token, entries, next, more),
            (
                Op::Borrow { ram },
                Ok(Reply::Borrowed {
                    lease,
                    secret,
                    entry,
                }),
            ) => self.borrowed(token, ram, (lease, secret, entry), pool),
            (Op::Open { lease }, Ok(Reply::Opened(function))) => {
                let opened = Box::new(OpenedPath {
                    function,
                    config: Vec::new(),
                });
                self.fetch(token, lease, opened)
            }
            (Op::Open { lease }, Err(refusal)) => {
                self.rows.free(lease);
                let mut actions = vec![BorrowerAction::ScanEnd(lease)];
                actions.extend(answer(token, Err(refusal.into())));
                actions
            }
            (Op::Config { lease, mut opened }, Ok(Reply::Bytes(bytes))) if !bytes.is_empty() => {
                opened.config.extend(bytes);
                self.fetch(token, lease, opened)
            }
            (Op::Return { lease }, result) => self.returned(token, lease, result, pool),
            (
                Op::MapTell {
                    lease,
                    starts,
                    rest,
                    told,
                },
                result,
            ) => self.map_told(token, lease, (starts, rest, told), result),
            (Op::UnmapTell { lease, freed }, Ok(_)) => self.unmap_told(lease, freed, pool),
            (Op::Forward, Ok(Reply::Bytes(bytes))) => answer(token, Ok(Answer::Bytes(bytes))),
            (Op::Forward, Ok(Reply::Done)) => answer(token, Ok(Answer::Done)),
            (_, Err(refusal)) => answer(token, Err(refusal.into())),
            (_, Ok(_)) => {
                let text = "the lender's answer does not fit the question: both ends must run \
                            versions that belong together";
                answer(token, Err(CallError::Gone(text.into())))
            }
        }
    }

    fn listed(
        &mut self,
        token: Option<Token>,
        mut entries: Vec<PoolEntry>,
        next: u32,
        more: Vec<PoolEntry>,
    ) -> Actions {
        let grew = !more.is_empty();
        entries.extend(more);
        if next == 0 || !grew || entries.len() >= ENTRIES_MAX {
            return answer(token, Ok(Answer::List(entries)));
        }
        self.send(token, Op::List { entries }, Request::List { cursor: next })
    }

    fn borrowed(
        &mut self,
        token: Option<Token>,
        ram: Option<u64>,
        (lease, secret, entry): (LeaseId, Secret, PoolEntry),
        pool: &mut SlicePool,
    ) -> Actions {
        let held = Lease {
            bdf: entry.bdf,
            secret,
            irq_count: entry.irq_count,
            closing: false,
            maps: BTreeMap::new(),
            untold: VecDeque::new(),
            telling: false,
            pinned: VecDeque::new(),
        };
        self.leases.insert(lease, held);
        let reserved = ram.map_or(Ok(()), |bytes| pool.reserve(Owner::Borrowed(lease), bytes));
        match reserved {
            Ok(()) => answer(token, Ok(Answer::Borrowed(lease, entry))),
            Err(refusal) => {
                // Nothing is left behind: the lease goes back before the refusal is told.
                self.leases.remove(&lease);
                let mut actions = self.send(None, Op::Forward, Request::Return { lease });
                actions.extend(answer(token, Err(refusal.into())));
                actions
            }
        }
    }

    fn fetch(&mut self, token: Option<Token>, lease: LeaseId, opened: Box<OpenedPath>) -> Actions {
        let have = opened.config.len() as u16;
        let want = opened.function.config_len;
        if have >= want {
            return answer(token, Ok(Answer::Opened(opened)));
        }
        let len = (want - have).min(CONFIG_PIECE);
        let request = Request::Config {
            lease,
            offset: have,
            len,
        };
        self.send(token, Op::Config { lease, opened }, request)
    }

    fn map_told(
        &mut self,
        token: Option<Token>,
        lease: LeaseId,
        (starts, mut rest, mut told): (Vec<u64>, VecDeque<Vec<MapRange>>, Vec<Span>),
        result: Result<Reply, Refusal>,
    ) -> Actions {
        let Some(held) = self.leases.get_mut(&lease) else {
            return answer(token, Err(CallError::Gone("the lease is over".into())));
        };
        // What was unmapped meanwhile must not be told any more: its slice may be given anew.
        for ranges in &mut rest {
            let still = |range: &MapRange| {
                held.maps
                    .get(&range.span.start())
                    .is_some_and(|map| map.offset == range.offset)
            };
            ranges.retain(still);
        }
        rest.retain(|ranges| !ranges.is_empty());
        match result {
            Ok(_) => match rest.pop_front() {
                None => {
                    for start in &starts {
                        if let Some(map) = held.maps.get_mut(start) {
                            map.live = true;
                        }
                    }
                    answer(token, Ok(Answer::Done))
                }
                Some(ranges) => {
                    told.extend(ranges.iter().map(|range| range.span));
                    let op = Op::MapTell {
                        lease,
                        starts,
                        rest,
                        told,
                    };
                    self.send(token, op, Request::Map { lease, ranges })
                }
            },
            Err(refusal) => {
                let last = RANGES_MAX.min(told.len());
                told.truncate(told.len() - last);
                let offsets = held.offsets_of(&starts);
                let cause = CallError::Refused(refusal);
                let mut actions = Vec::new();
                for spans in told.chunks(RANGES_MAX) {
                    let request = Request::Unmap {
                        lease,
                        spans: spans.to_vec(),
                    };
                    actions.extend(self.send(None, Op::Forward, request));
                }
                let step = self.step(
                    token,
                    Op::MapUndo {
                        lease,
                        starts,
                        cause,
                    },
                );
                actions.push(BorrowerAction::Unpin(step, offsets));
                actions
            }
        }
    }

    fn returned(
        &mut self,
        token: Option<Token>,
        lease: LeaseId,
        result: Result<Reply, Refusal>,
        pool: &mut SlicePool,
    ) -> Actions {
        self.leases.remove(&lease);
        self.rows.free(lease);
        pool.free_all(Owner::Borrowed(lease));
        let mut actions = vec![BorrowerAction::ScanEnd(lease)];
        let result = result.map(|_| Answer::Done).map_err(CallError::from);
        actions.extend(answer(token, result));
        actions
    }

    /// The lender has revoked a lease. Answered to the peer by the driver when the returned
    /// actions' unpin is done.
    pub fn revoked(&mut self, lease: LeaseId, why: String) -> Actions {
        let Some(mut held) = self.leases.remove(&lease) else {
            return Vec::new();
        };
        self.rows.free(lease);
        let live = held.take_all();
        let step = self.step(None, Op::RevokedUnpin { lease });
        vec![
            BorrowerAction::ScanEnd(lease),
            BorrowerAction::Lost(lease, why),
            BorrowerAction::Unpin(step, live),
        ]
    }

    /// The link session is over: calls are answered, leases lost, guest RAM unpinned.
    pub fn session_over(&mut self, why: &str) -> Actions {
        let mut actions = Vec::new();
        let mut pins_under_way = HashMap::new();
        for (step, (token, op)) in self.steps.drain() {
            actions.extend(answer(token, Err(CallError::Gone(why.to_owned()))));
            // The mapper's answer is still to come; nothing is reused before.
            if op.is_at_mapper() {
                pins_under_way.insert(step, (None, Op::SessionUnpin));
            }
        }
        self.steps = pins_under_way;
        let leases = std::mem::take(&mut self.leases);
        for (lease, mut held) in leases {
            actions.push(BorrowerAction::ScanEnd(lease));
            actions.push(BorrowerAction::Lost(lease, why.to_owned()));
            let step = self.step(None, Op::SessionUnpin);
            actions.push(BorrowerAction::Unpin(step, held.take_all()));
        }
        self.rows = Rows::default();
        actions
    }

    /// Whether nothing of an ended session is under way.
    pub fn is_undone(&self) -> bool {
        self.steps.is_empty()
    }
}

impl Op {
    fn is_at_mapper(&self) -> bool {
        matches!(
            self,
            Self::MapPin { .. }
                | Self::MapUndo { .. }
                | Self::Unpin { .. }
                | Self::ReturnUnpin { .. }
                | Self::RevokedUnpin { .. }
                | Self::SessionUnpin
        )
    }
}

impl Lease {
    fn check_new(&self, maps: &[GuestMap]) -> Result<(), CallError> {
        if self.maps.len() + maps.len() > MAPS_MAX {
            let text = format!("a guest has at most {MAPS_MAX} mappings: give it larger pages");
            return Err(CallError::Gone(text));
        }
        for map in maps {
            let before = self.maps.range(..map.span.end()).next_back();
            if before.is_some_and(|(start, old)| start + old.len > map.span.start()) {
                return Err(CallError::Overlap(map.span));
            }
        }
        Ok(())
    }

    fn forget(&mut self, starts: &[u64], lease: LeaseId, pool: &mut SlicePool) {
        for start in starts {
            if let Some(map) = self.maps.remove(start) {
                pool.free(Owner::Borrowed(lease), map.offset);
            }
        }
    }

    fn offsets_of(&self, starts: &[u64]) -> Vec<Slice> {
        let maps = starts.iter().filter_map(|start| self.maps.get(start));
        maps.map(|map| (map.offset, map.len)).collect()
    }

    /// Takes all mappings that lie whole within `span`; a cut one is an error and nothing is taken.
    fn take_within(&mut self, span: Span) -> Result<Vec<Taken>, CallError> {
        let before = self.maps.range(..span.start()).next_back();
        let from = before.map_or(span.start(), |(start, _)| *start);
        let mut taken = Vec::new();
        for (start, map) in self.maps.range(from..span.end()) {
            let held = Span::new(*start, map.len).filter(|held| held.overlaps(span));
            match held {
                None => {}
                Some(held) if span.contains(held) => taken.push((held, (map.offset, map.len))),
                Some(_) => return Err(CallError::Overlap(span)),
            }
        }
        for (held, _) in &taken {
            self.maps.remove(&held.start());
        }
        Ok(taken)
    }

    fn take_all(&mut self) -> Vec<Slice> {
        std::mem::take(&mut self.maps)
            .into_values()
            .map(|map| (map.offset, map.len))
            .collect()
    }
}
