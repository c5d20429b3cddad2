//! Messages that no honest port would send: any fields, in a form that the codec takes.

use crate::memory::{BLOCK_BYTES, BLOCKS, address};
use crate::random::Random;
use vfio_shim::model::{Access, Bdf, FunctionInfo, IrqIndex, Span, WindowOffset};
use vfio_shim::path::message::{
    CONFIG_BYTES_MAX, MapRange, Message, OpId, RANGES_MAX, RemoteFunction, Reply, Request, Secret,
};
use vfio_shim::path::{LeaseId, PoolEntry, PoolState, Refusal, RefusalCode};

/// What a forger knows of the honest host, and takes its fields from.
#[derive(Default)]
pub struct Known {
    /// Functions of the honest host.
    pub functions: Vec<Bdf>,
    /// Leases that it heard of, with what opens them.
    pub leases: Vec<(LeaseId, Secret)>,
    /// Requests of the honest host that it has seen: their ids and ops.
    pub asked: Vec<(OpId, u16)>,
    /// What its own functions are.
    pub infos: Vec<FunctionInfo>,
}

/// Numbers at which sums and products go wrong.
const EDGES: [u64; 9] = [
    0,
    1,
    4095,
    1 << 16,
    (1 << 32) - 1,
    1 << 32,
    1 << 63,
    u64::MAX - 4095,
    u64::MAX,
];

/// Any number, and rather one at an edge.
pub fn number(random: &mut Random) -> u64 {
    match random.below(4) {
        0 => EDGES[random.below(EDGES.len())],
        1 => random.below(16) as u64,
        2 => random.below(64 << 20) as u64,
        _ => random.draw(),
    }
}

/// One that an honest port could say, or any.
fn small(random: &mut Random, end: usize) -> u32 {
    match random.once_in(3) {
        true => number(random) as u32,
        false => random.below(end) as u32,
    }
}

fn page(random: &mut Random) -> u64 {
    let any = match random.once_in(3) {
        true => number(random),
        false => random.below(64 << 20) as u64,
    };
    any & !(BLOCK_BYTES - 1)
}

fn span(random: &mut Random) -> Span {
    let start = match random.once_in(2) {
        true => address(random.below(BLOCKS)),
        false => page(random),
    };
    let len = match random.once_in(3) {
        true => page(random),
        false => BLOCK_BYTES << random.below(4),
    };
    Span::new(start, len).unwrap_or(Span::EMPTY)
}

fn range(random: &mut Random) -> MapRange {
    MapRange {
        span: span(random),
        offset: WindowOffset(page(random)),
        access: match random.once_in(2) {
            true => Access::READ_WRITE,
            false => Access::READ,
        },
    }
}

fn count(random: &mut Random) -> usize {
    match random.once_in(6) {
        // One too many for the codec now and then: then it is no message at all.
        true => RANGES_MAX + random.below(2),
        false => 1 + random.below(4),
    }
}

fn irq(random: &mut Random) -> IrqIndex {
    IrqIndex::ALL[random.below(IrqIndex::COUNT)]
}

impl Known {
    fn lease(&self, random: &mut Random) -> (LeaseId, Secret) {
        let known = random.pick(&self.leases);
        let guess = (LeaseId(random.below(12) as u64), Secret([7; 16]));
        match random.below(6) {
            0 => (LeaseId(random.draw()), Secret([0; 16])),
            1 => guess,
            _ => known.unwrap_or(guess),
        }
    }

    fn bdf(&self, random: &mut Random) -> Bdf {
        let known = random.pick(&self.functions);
        known.unwrap_or_else(|| "4a:00.7".parse().expect("an address"))
    }

    /// A request.
    pub fn request(&self, random: &mut Random) -> Message {
        let (lease, secret) = self.lease(random);
        let request = match random.below(20) {
            0 => Request::Hello {
                node: random.below(1 << 16) as u16,
                window_bytes: number(random),
            },
            1 => Request::List {
                cursor: number(random) as u32,
            },
            2..=5 => Request::Borrow {
                bdf: self.bdf(random),
            },
            6 => Request::Return { lease },
            7 | 8 => Request::Open {
                lease,
                secret,
                irq_first: small(random, 16),
                irq_count: small(random, 5),
            },
            9 => Request::Config {
                lease,
                offset: number(random) as u16,
                len: number(random) as u16,
            },
            10..=12 => {
                let many = count(random);
                let ranges = (0..many).map(|_| range(random)).collect();
                Request::Map { lease, ranges }
            }
            13 => {
                let many = count(random);
                let spans = (0..many).map(|_| span(random)).collect();
                Request::Unmap { lease, spans }
            }
            14 => Request::Irqs {
                lease,
                index: irq(random),
                enable: random.once_in(2),
            },
            15 => Request::Mask {
                lease,
                index: irq(random),
                start: small(random, 4),
                count: small(random, 4),
                masked: random.once_in(2),
            },
            16 => Request::BusMaster {
                lease,
                enable: random.once_in(2),
            },
            17 => Request::Reset { lease },
            18 => self.access(lease, random),
            _ => Request::Revoked {
                lease,
                text: "a forger's words\u{1b}[2J".repeat(1 + random.below(20)),
            },
        };
        Message::Request(OpId(number(random)), request)
    }

    fn access(&self, lease: LeaseId, random: &mut Random) -> Request {
        let (region, offset) = (random.below(12) as u8, number(random));
        match random.once_in(2) {
            true => Request::RegionRead {
                lease,
                region,
                offset,
                len: random.below(10) as u8,
            },
            false => Request::RegionWrite {
                lease,
                region,
                offset,
                data: vec![0x5a; random.below(10)],
            },
        }
    }

    fn entry(&self, random: &mut Random) -> PoolEntry {
        PoolEntry {
            bdf: self.bdf(random),
            ids: self.infos.first().map(|info| info.ids).unwrap_or_default(),
            state: PoolState::Available,
            irq_count: number(random) as u32,
            bar_bytes: number(random),
            serial: random.draw(),
        }
    }

    fn opened(&self, random: &mut Random) -> RemoteFunction {
        let info = &self.infos[random.below(self.infos.len())];
        let slices = std::array::from_fn(|_| {
            let slice = WindowOffset(page(random));
            (!random.once_in(4)).then_some(slice)
        });
        let mut opened = RemoteFunction::new(info, &slices, number(random) as u16);
        if random.once_in(2) {
            opened.regions[random.below(6)].info.size = number(random);
        }
        if random.once_in(4) {
            opened.irqs[random.below(IrqIndex::COUNT)].count = number(random) as u32;
        }
        opened
    }

    /// An answer: to something that was asked, or that was not.
    pub fn reply(&self, random: &mut Random) -> Message {
        let asked = random.pick(&self.asked);
        let (op, code) = asked
            .filter(|_| !random.once_in(4))
            .unwrap_or_else(|| (OpId(number(random)), random.below(20) as u16));
        let (lease, secret) = self.lease(random);
        let reply = match random.below(8) {
            0 => Ok(Reply::Done),
            1 => Ok(Reply::Hello {
                node: random.below(1 << 16) as u16,
                window_bytes: number(random),
            }),
            2 => Ok(Reply::List {
                next: number(random) as u32,
                entries: (0..random.below(5)).map(|_| self.entry(random)).collect(),
            }),
            3 => Ok(Reply::Borrowed {
                lease,
                secret,
                entry: self.entry(random),
            }),
            4 | 5 => Ok(Reply::Opened(self.opened(random))),
            6 => Ok(Reply::Bytes(vec![0xa5; random.below(CONFIG_BYTES_MAX + 2)])),
            _ => {
                let code = RefusalCode::Other(random.below(40) as u16);
                Err(Refusal::new(code, number(random), "a forger's refusal"))
            }
        };
        Message::Reply(op, code, reply)
    }
}
