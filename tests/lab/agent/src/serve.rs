//! Answers the runner's requests on one character device, each in a thread of its own.

use crate::process::{self, Children};
use crate::relay::Relays;
use anyhow::{Context, Result};
use lab_agent::wire::{BODY_BYTES_MAX, Frame, Message, Reply, Request, read_frame, write_frame};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// The way back to the runner, shared by all who answer.
#[derive(Clone)]
pub struct Port(Arc<Mutex<File>>);

impl Port {
    /// Sends a frame; a runner that went away is no concern of the sender.
    pub fn send(&self, frame: &Frame) {
        let mut file = self
            .0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Err(error) = write_frame(&mut *file, frame) {
            eprintln!("lab-agent: reply {}: {error}", frame.head.id);
        }
    }
}

/// A virtio port reads as ended while nobody is connected at its other end, and poll reports
/// a hang-up at once then, so there is nothing to wait on but time.
struct Patient(File);

const RECONNECT_POLL: Duration = Duration::from_millis(20);

impl Read for Patient {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        loop {
            match self.0.read(into)? {
                0 => thread::sleep(RECONNECT_POLL),
                bytes => return Ok(bytes),
            }
        }
    }
}

/// Serves until the device fails.
pub fn serve(path: &str) -> Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open {path}"))?;
    let mut reader = Patient(file.try_clone()?);
    let port = Port(Arc::new(Mutex::new(file)));
    let relays = Relays::default();
    let children = Children::default();
    loop {
        let mut frame = read_frame(&mut reader).with_context(|| format!("cannot read {path}"))?;
        if !frame.head.via.is_empty() {
            let socket = frame.head.via.remove(0);
            relays.pass(&socket, frame, &port);
            continue;
        }
        let Message::Request(request) = frame.head.message else {
            continue;
        };
        let (id, body, port, children) =
            (frame.head.id, frame.body, port.clone(), children.clone());
        thread::spawn(move || {
            let answer = match answer(request, body, &children) {
                Ok((reply, body)) => Frame::reply(id, reply, body),
                Err(error) => Frame::failed(id, format!("{error:#}")),
            };
            port.send(&answer);
        });
    }
}

fn answer(request: Request, body: Vec<u8>, children: &Children) -> Result<(Reply, Vec<u8>)> {
    match request {
        Request::Ping => Ok((Reply::Done, Vec::new())),
        Request::Run { argv, timeout_ms } => {
            process::run(&argv, body, Duration::from_millis(timeout_ms))
        }
        Request::Spawn { argv, output } => {
            let pid = children.spawn(&argv, &output)?;
            Ok((Reply::Spawned { pid }, Vec::new()))
        }
        Request::Wait { pid, timeout_ms } => {
            let reply = children.wait(pid, Duration::from_millis(timeout_ms))?;
            Ok((reply, Vec::new()))
        }
        Request::Kill { pid, signal } => {
            process::kill(pid, signal)?;
            Ok((Reply::Done, Vec::new()))
        }
        Request::Put { path, mode } => {
            put(&path, mode, &body).with_context(|| format!("cannot write {path}"))?;
            Ok((Reply::Done, Vec::new()))
        }
        Request::Get {
            path,
            offset,
            bytes_max,
        } => {
            let body =
                get(&path, offset, bytes_max).with_context(|| format!("cannot read {path}"))?;
            Ok((Reply::Done, body))
        }
    }
}

/// In sysfs and /proc a file is never made, and permissions are the kernel's.
fn put(path: &str, mode: u32, body: &[u8]) -> Result<()> {
    if Path::new(path).exists() {
        OpenOptions::new()
            .write(true)
            .truncate(true)
            .open(path)?
            .write_all(body)?;
        return Ok(());
    }
    let mut file = File::create(path)?;
    file.write_all(body)?;
    file.set_permissions(PermissionsExt::from_mode(mode))?;
    Ok(())
}

fn get(path: &str, offset: u64, bytes_max: usize) -> Result<Vec<u8>> {
    let mut file = File::open(path)?;
    if offset > 0 {
        file.seek(SeekFrom::Start(offset))?;
    }
    let mut body = Vec::new();
    file.take(bytes_max.min(BODY_BYTES_MAX) as u64)
        .read_to_end(&mut body)?;
    Ok(body)
}
