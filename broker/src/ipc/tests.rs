//! The messages between daemon and worker: all of them there and back, at their limits and over, and from any bytes.

use super::*;
use crate::jail::Report;
use proptest::{collection::vec, prelude::*};
use rustix::{
    event::{EventfdFlags, eventfd},
    fs::{MemfdFlags, memfd_create},
    io::{Errno, read},
    net::{SendFlags, send},
    pipe::{PipeFlags, pipe_with},
};
use std::os::fd::{AsFd, OwnedFd};
use vfio_shim::{
    model::{Access, FunctionIds, IrqIndex, RegionInfo, Span, WindowOffset},
    path::{
        CallError, LeaseId, Refusal, RefusalCode,
        message::{RemoteFunction, RemoteRegion, Request},
    },
};
use vmm_glue::vfio_user::SessionState;

fn fd() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

fn span(start: u64, len: u64) -> Span {
    Span::new(start, len).unwrap()
}

fn piece(at: u64) -> MapPiece {
    MapPiece {
        span: span(at << 12, 4096),
        access: Access::READ,
        file: 1,
        offset: 0x3000,
    }
}

fn part(pieces: usize, files: usize) -> ToPort {
    let part = MapPart {
        last: true,
        pieces: (0..pieces as u64).map(piece).collect(),
        files: (0..files).map(|_| fd()).collect(),
    };
    ToPort::Map(Token(7), part)
}

fn told(signals: usize) -> ToPort {
    let told = Told {
        state: SessionState::Connected { pid: 77 },
        last_error: Some("it was refused".into()),
        counters: [1, 2, 3, 4, 5, u64::MAX],
        signals: (0..signals as u64).collect(),
    };
    ToPort::Told(Token(9), told)
}

fn check(ranges: usize) -> ToPort {
    let range = |at: u64| (1 << 32, at, span(at << 12, 4096));
    let ranges = (0..ranges as u64).map(range).collect();
    ToPort::Check(Token(8), Check { pid: 77, ranges })
}

fn from_worker() -> Vec<ToPort> {
    let lease = LeaseId(0);
    let report = Report {
        landlock: true,
        seccomp: true,
        namespaces: vec!["net".into(), "ipc".into()],
    };
    let write = Request::RegionWrite {
        lease,
        region: 6,
        offset: 0x20,
        data: vec![1, 2, 3, 4],
    };
    vec![
        ToPort::Ready(report),
        ToPort::Forward(Token(1), Request::Reset { lease }),
        ToPort::Forward(Token(2), write),
        part(2, 2),
        ToPort::Unmap(Token(3), span(0, 1 << 40)),
        ToPort::Load(Token(4), 5, u64::MAX, 8),
        ToPort::Store(0, 0x18, vec![9; 4]),
        check(3),
        ToPort::Holder(Token(5), 77, fd()),
        told(2),
        ToPort::Failed("the function cannot be reset".into()),
    ]
}

fn to_worker() -> Vec<ToWorker> {
    let mut function = RemoteFunction {
        config_len: 4096,
        ..RemoteFunction::default()
    };
    function.regions[0] = RemoteRegion {
        info: RegionInfo {
            size: 0x4000,
            readable: true,
            writable: true,
            areas: vec![span(0, 0x1000), span(0x2000, 0x2000)],
        },
        slice: Some(WindowOffset(0x1_0000)),
    };
    function.irqs[IrqIndex::Msix as usize].count = 9;
    let ids = FunctionIds {
        vendor: 0x8086,
        device: 0xe212,
        subsystem_vendor: 1,
        subsystem_device: 2,
        class: 0x03_0000,
        revision: 3,
    };
    let start = Start {
        lease: 0x2a,
        path: "/run/sublet/vm1.sock".into(),
        mapped: true,
        memory_check: true,
        vmm_uids: (0..PEERS_MAX as u32).collect(),
        vmm_gids: vec![7],
        maps_max: 64,
        bytes_max: 1 << 40,
        window: Some(0x1000),
    };
    let fds = (0..4).map(|_| fd()).collect();
    let mut messages = vec![
        ToWorker::Function(ids, Box::new(function)),
        ToWorker::Config(vec![0x5a; 2048]),
        ToWorker::Start(start, fds),
        ToWorker::Tell(Token(1), 256),
        ToWorker::Lost("the link went down".into()),
        ToWorker::Raised,
    ];
    let refusal = Refusal::new(RefusalCode::WindowFull, 1 << 33, "the window is full");
    let results = [
        Ok(Answered::Done),
        Ok(Answered::Bytes(vec![1, 2])),
        Ok(Answered::Unmapped(u64::MAX)),
        Err(CallError::Gone("it is gone".into())),
        Err(CallError::Refused(refusal)),
        Err(CallError::Overlap(span(0x1000, 0x1000))),
        Err(CallError::Bisect(span(0x1000, 0x2000))),
        Err(CallError::Align(span(0x1001, 0x1000))),
        Err(CallError::Timeout(4000)),
        Err(CallError::Pin("it cannot be pinned".into())),
    ];
    messages.extend(results.map(|result| ToWorker::Answer(Token(5), result)));
    messages
}

fn copies(fds: &[std::os::fd::BorrowedFd<'_>]) -> Vec<OwnedFd> {
    let copy = |fd: &std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
    fds.iter().map(copy).collect()
}

#[test]
fn every_message_arrives_as_it_was_sent_and_not_with_a_byte_less_or_more() {
    let (near, far) = Channel::pair().unwrap();
    let like = |message: &dyn std::fmt::Debug| format!("{message:?}");
    for message in from_worker() {
        near.send_to_port(&message).unwrap();
        let came = far.receive_from_worker(true).unwrap().unwrap();
        assert_eq!(came.encode().unwrap(), message.encode().unwrap());
        assert_eq!(came.fds().len(), message.fds().len(), "{}", like(&message));
        let bytes = message.encode().unwrap();
        for cut in 0..bytes.len() {
            assert!(ToPort::decode(&bytes[..cut], copies(&message.fds())).is_err());
        }
        let more = [&bytes[..], &[0]].concat();
        assert!(ToPort::decode(&more, copies(&message.fds())).is_err());
        let spare = [copies(&message.fds()), vec![fd()]].concat_fds();
        assert!(ToPort::decode(&bytes, spare).is_err(), "{}", like(&message));
    }
    for message in to_worker() {
        far.send_to_worker(&message, true).unwrap();
        let came = near.receive_from_port().unwrap().unwrap();
        assert_eq!(came.encode().unwrap(), message.encode().unwrap());
        let bytes = message.encode().unwrap();
        for cut in 0..bytes.len() {
            assert!(ToWorker::decode(&bytes[..cut], copies(&message.fds())).is_err());
        }
        let spare = [copies(&message.fds()), vec![fd()]].concat_fds();
        assert!(
            ToWorker::decode(&bytes, spare).is_err(),
            "{}",
            like(&message)
        );
    }
    drop(near);
    assert!(far.receive_from_worker(true).unwrap().is_none(), "the end");
}

/// `concat` of what cannot be copied.
trait ConcatFds {
    fn concat_fds(self) -> Vec<OwnedFd>;
}

impl<const N: usize> ConcatFds for [Vec<OwnedFd>; N] {
    fn concat_fds(self) -> Vec<OwnedFd> {
        self.into_iter().flatten().collect()
    }
}

#[test]
fn limits_hold_and_one_more_is_refused() {
    let (near, far) = Channel::pair().unwrap();
    for message in [
        part(PIECES_MAX, FDS_MAX),
        told(SIGNALS_MAX),
        check(PIECES_MAX),
    ] {
        near.send_to_port(&message).unwrap();
        let came = far.receive_from_worker(true).unwrap().unwrap();
        assert_eq!(came.fds().len(), message.fds().len());
    }
    for message in [
        part(PIECES_MAX + 1, 1),
        part(1, FDS_MAX + 1),
        told(SIGNALS_MAX + 1),
        check(PIECES_MAX + 1),
    ] {
        assert!(near.send_to_port(&message).is_err());
    }
    let start = to_worker().into_iter().find_map(|message| match message {
        ToWorker::Start(start, fds) => Some((start, fds)),
        _ => None,
    });
    let (mut start, fds) = start.unwrap();
    start.vmm_gids = vec![7; PEERS_MAX + 1];
    assert!(ToWorker::Start(start, fds).encode().is_err());
    let config = |bytes| ToWorker::Config(vec![0; bytes]);
    assert!(config(2048).encode().is_ok() && config(2049).encode().is_err());
    for bytes in [MESSAGE_BYTES_MAX, MESSAGE_BYTES_MAX + 1] {
        send(near.as_fd(), &vec![0xff; bytes], SendFlags::empty()).unwrap();
        let error = far.receive_from_worker(true).unwrap_err();
        let cut = matches!(error, ChannelError::Message(MessageError::TooLong(..)));
        assert_eq!(cut, bytes > MESSAGE_BYTES_MAX, "{error}");
    }
}

#[test]
fn requests_that_are_the_ports_own_are_refused_and_leases_are_not_told() {
    let lease = LeaseId(0xdead_beef);
    let irqs = |index| Request::Irqs {
        lease,
        index,
        enable: true,
    };
    for request in [
        Request::Return { lease },
        Request::List { cursor: 0 },
        irqs(IrqIndex::Intx),
        irqs(IrqIndex::Err),
        irqs(IrqIndex::Req),
        Request::Map {
            lease,
            ranges: Vec::new(),
        },
    ] {
        let bytes = ToPort::Forward(Token(1), request).encode().unwrap();
        let refused = ToPort::decode(&bytes, Vec::new()).unwrap_err();
        assert!(
            matches!(refused, MessageError::NotForWorkers(_)),
            "{refused}"
        );
    }
    let reset = ToPort::Forward(Token(1), Request::Reset { lease });
    let bytes = reset.encode().unwrap();
    match ToPort::decode(&bytes, Vec::new()).unwrap() {
        ToPort::Forward(_, request) => assert_eq!(request.lease(), Some(LeaseId(0))),
        other => panic!("{other:?}"),
    }
}

#[test]
fn worker_that_does_not_read_is_not_waited_for() {
    let (near, _far) = Channel::pair().unwrap();
    let filled = (0..100_000).find_map(|_| {
        let sent = near.send_to_worker(&ToWorker::Raised, false).unwrap();
        (sent == Sent::Full).then_some(())
    });
    filled.expect("a full channel, and no wait");
}

/// What parses can be written again, and parses to the same.
fn any_bytes(bytes: &[u8], fds: usize) {
    let brought = || (0..fds).map(|_| fd()).collect();
    if let Ok(message) = ToPort::decode(bytes, brought()) {
        let again = message.encode().unwrap();
        let once_more = ToPort::decode(&again, copies(&message.fds())).unwrap();
        assert_eq!(once_more.encode().unwrap(), again);
    }
    if let Ok(message) = ToWorker::decode(bytes, brought()) {
        let again = message.encode().unwrap();
        let once_more = ToWorker::decode(&again, copies(&message.fds())).unwrap();
        assert_eq!(once_more.encode().unwrap(), again);
    }
}

proptest! {
    #[test]
    fn any_bytes_are_a_message_or_refused(
        kind in 0u16..48,
        rest in vec(any::<u8>(), 0..200),
        fds in 0usize..5,
    ) {
        any_bytes(&[&kind.to_le_bytes(), &rest[..]].concat(), fds);
    }

    #[test]
    fn a_message_with_bytes_changed_is_a_message_or_refused(
        which in 0usize..64,
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut messages: Vec<Vec<u8>> = from_worker().iter().map(|m| m.encode().unwrap()).collect();
        messages.extend(to_worker().iter().map(|m| m.encode().unwrap()));
        let which = which % messages.len();
        let bytes = &mut messages[which];
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        for fds in 0..5 {
            any_bytes(bytes, fds);
        }
    }
}

/// Closing it may take for ever, so it is not even closed.
#[test]
fn what_is_no_memory_is_refused_of_a_worker_and_nobody_waits_for_its_end() {
    let (near, far) = Channel::pair().unwrap();
    let memory = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let (end, strange) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
    for (files, good) in [
        (vec![memory.try_clone().unwrap()], true),
        (vec![memory, strange], false),
    ] {
        let part = MapPart {
            last: true,
            pieces: Vec::new(),
            files,
        };
        near.send_to_port(&ToPort::Map(Token(1), part)).unwrap();
        let came = far.receive_from_worker(false);
        assert_eq!(came.is_ok(), good, "{came:?}");
        let refused = came
            .err()
            .is_none_or(|error| matches!(error, ChannelError::Message(MessageError::NoMemory)));
        assert!(refused);
    }
    assert_eq!(read(&end, &mut [0u8; 1]), Err(Errno::AGAIN), "still open");
}
