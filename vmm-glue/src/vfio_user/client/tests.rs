//! Servers that lie, stop short or refuse: the client says so, and the function behind it reads as gone.

use super::*;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;
use zerocopy::FromZeros;

const JSON: &[u8] = b"{\"capabilities\":{\"max_msg_fds\":1,\"max_dma_maps\":2}}\0";

/// A server of one connection that answers by a script: each reply goes out as it stands, once
/// its request has come.
struct Server {
    dir: tempfile::TempDir,
    handle: Option<JoinHandle<Vec<u16>>>,
}

fn reply(command: Command, flags: u32, errno: u32, body: &[u8]) -> Vec<u8> {
    let header = wire::Header {
        id: 0.into(),
        command: (command as u16).into(),
        size: ((wire::HEADER_BYTES + body.len()) as u32).into(),
        flags: flags.into(),
        errno: errno.into(),
    };
    [header.as_bytes(), body].concat()
}

/// Takes one request; its id and command.
fn request(stream: &mut UnixStream) -> Option<(u16, u16)> {
    let mut header = wire::Header::new_zeroed();
    stream.read_exact(header.as_mut_bytes()).ok()?;
    let mut body = vec![0; header.size.get() as usize - wire::HEADER_BYTES];
    stream.read_exact(&mut body).ok()?;
    Some((header.id.get(), header.command.get()))
}

impl Server {
    fn new(script: Vec<Vec<u8>>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let handle = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut commands = Vec::new();
            for mut answer in script {
                let Some((id, command)) = request(&mut stream) else {
                    break;
                };
                commands.push(command);
                if answer.len() >= 2 && answer[..2] == [0, 0] {
                    answer[..2].copy_from_slice(&id.to_le_bytes());
                }
                stream.write_all(&answer).unwrap();
            }
            commands
        });
        Self {
            dir,
            handle: Some(handle),
        }
    }

    fn connect(&self) -> Result<Client, ClientError> {
        Client::connect(&self.dir.path().join("s"))
    }

    fn commands(&mut self) -> Vec<u16> {
        self.handle.take().unwrap().join().unwrap()
    }
}

fn version() -> Vec<u8> {
    let version = wire::Version {
        major: 0.into(),
        minor: 1.into(),
    };
    reply(Command::Version, 1, 0, &[version.as_bytes(), JSON].concat())
}

/// All that a client asks at the start, of a function with a BAR0 of 4 KiB and 20 MSI-X vectors.
fn start() -> Vec<Vec<u8>> {
    let device = wire::DeviceInfo {
        argsz: 16.into(),
        flags: VFIO_DEVICE_FLAGS_RESET.into(),
        regions: 9.into(),
        irqs: 5.into(),
    };
    let mut script = vec![
        version(),
        reply(Command::DeviceGetInfo, 1, 0, device.as_bytes()),
    ];
    for index in 0..9u32 {
        let region = wire::RegionInfo {
            argsz: 32.into(),
            flags: 3.into(),
            index: index.into(),
            size: if matches!(index, 0 | 7) { 4096 } else { 0 }.into(),
            ..wire::RegionInfo::default()
        };
        script.push(reply(Command::DeviceGetRegionInfo, 1, 0, region.as_bytes()));
    }
    for index in 0..5u32 {
        let irq = wire::IrqInfo {
            argsz: 16.into(),
            flags: 9.into(),
            index: index.into(),
            count: if index == 2 { 20 } else { 0 }.into(),
        };
        script.push(reply(Command::DeviceGetIrqInfo, 1, 0, irq.as_bytes()));
    }
    script.push(read(0x30));
    script
}

fn read(bytes: usize) -> Vec<u8> {
    let access = access(RegionIndex::CONFIG, 0, bytes);
    let data = vec![0x5a; bytes];
    reply(
        Command::RegionRead,
        1,
        0,
        &[access.as_bytes(), &data].concat(),
    )
}

fn started(script: Vec<Vec<u8>>) -> (Server, Client) {
    let server = Server::new([start(), script].concat());
    let client = server.connect().unwrap();
    (server, client)
}

#[test]
fn servers_that_do_not_keep_to_the_protocol_are_refused_in_words() {
    let words = |script: Vec<Vec<u8>>| Server::new(script).connect().err().unwrap().to_string();
    let gone = "the vfio-user server is gone: ";
    assert_eq!(words(vec![]), format!("{gone}it closed the socket"));
    let mut alien = version();
    alien[0] = 9;
    let no_reply = "it answered Version with a message that is no reply to it";
    assert_eq!(words(vec![alien]), format!("{gone}{no_reply}"));
    let mut huge = version();
    huge[4..8].copy_from_slice(&(wire::MESSAGE_MAX as u32 + 1).to_le_bytes());
    assert_eq!(words(vec![huge]), format!("{gone}{no_reply}"));
    let mut newer = version();
    newer[wire::HEADER_BYTES + 2] = 2;
    assert_eq!(
        words(vec![newer]),
        format!("{gone}it speaks another version than the one asked for")
    );
    assert_eq!(
        words(vec![reply(Command::Version, 1, 0, &[0])]),
        format!("{gone}its VERSION has no version")
    );
    assert_eq!(
        words(vec![
            version(),
            reply(Command::DeviceGetInfo, 1, 0, &[0; 3])
        ]),
        format!("{gone}a reply is shorter than its structure")
    );
    assert_eq!(
        words(vec![version(), reply(Command::DeviceGetInfo, 0x21, 5, &[])]),
        "the vfio-user server refused DeviceGetInfo"
    );
}

#[test]
fn refusals_are_told_and_the_connection_goes_on() {
    let refusal = |command| reply(command, 0x21, 22, &[]);
    let (_server, client) = started(vec![
        refusal(Command::DeviceReset),
        refusal(Command::DeviceSetIrqs),
        refusal(Command::DmaMap),
        read(4),
    ]);
    assert!(matches!(client.reset(), Err(FunctionError::Kernel { .. })));
    let masked = client.mask_irqs(IrqIndex::Msix, 0, 20, true);
    assert!(matches!(masked, Err(FunctionError::Kernel { .. })));
    let memory = rustix::fs::memfd_create("m", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let map = DmaMap {
        span: Span::new(0, 4096).unwrap(),
        access: vfio_shim::model::Access::READ,
        memory: Memory::Fd(memory.as_fd(), 0),
    };
    assert!(matches!(client.map(&[map]), Err(MapError::Kernel { .. })));
    assert_eq!(client.available(), 2);
    let mut data = [0; 4];
    client
        .region_read(RegionIndex::CONFIG, 0, &mut data)
        .unwrap();
    assert_eq!(data, [0x5a; 4]);
}

#[test]
fn function_behind_a_server_that_went_away_reads_as_ones_and_drops_writes() {
    let (mut server, client) = started(vec![]);
    server.commands();
    let mut data = [0; 4];
    client.region_read(RegionIndex(0), 0, &mut data).unwrap();
    assert_eq!(data, [0xff; 4]);
    client.region_write(RegionIndex(0), 0, &data).unwrap();
    assert!(matches!(client.reset(), Err(FunctionError::Gone(_))));
}

#[test]
fn read_of_another_length_reads_as_ones() {
    let (_server, client) = started(vec![read(3)]);
    let mut data = [0; 4];
    client.region_read(RegionIndex(0), 0, &mut data).unwrap();
    assert_eq!(data, [0xff; 4]);
}

#[test]
fn triggers_go_out_in_messages_of_no_more_fds_than_a_server_takes() {
    let done = || reply(Command::DeviceSetIrqs, 1, 0, &[]);
    let (mut server, client) = started(vec![done(), done(), done(), done()]);
    let event = || {
        let flags = rustix::event::EventfdFlags::CLOEXEC;
        Some(rustix::event::eventfd(0, flags).unwrap())
    };
    // 16 and 1 to give, 2 to take away, 1 to give.
    let given = (0..17).map(|_| event());
    let triggers = given.chain([None, None, event()]).collect();
    client.set_irqs(IrqIndex::Msix, 0, triggers).unwrap();
    drop(client);
    let sets = server.commands();
    let sets = sets.iter().filter(|c| **c == Command::DeviceSetIrqs as u16);
    assert_eq!(sets.count(), 4);
}

#[test]
fn maps_past_what_the_server_takes_are_refused_here() {
    let done = || reply(Command::DmaMap, 1, 0, &[]);
    let (_server, client) = started(vec![done(), done()]);
    let memory = rustix::fs::memfd_create("m", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let map = |page: u64| {
        let map = DmaMap {
            span: Span::new(page << 12, 4096).unwrap(),
            access: vfio_shim::model::Access::READ_WRITE,
            memory: Memory::Fd(memory.as_fd(), 0),
        };
        client.map(&[map])
    };
    map(0).unwrap();
    assert!(matches!(map(0), Err(MapError::Overlap(_))));
    map(1).unwrap();
    assert_eq!(client.available(), 0);
    assert!(matches!(map(2), Err(MapError::TooMany(2))));
}
