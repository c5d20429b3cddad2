//! The warden as a process: what it is left with, how it ends, and what its death costs.

#[allow(dead_code, reason = "each test program uses a part of it")]
mod soft;

use rustix::process::{Signal, geteuid};
use soft::{Rig, Vmm, descriptors, lives, signal, until};
use std::{fs, os::unix::fs::PermissionsExt, path::Path, process::Command, time::Duration};
use sublet::{
    daemon::vocabulary::ErrorCode,
    ipc::Channel,
    jail::Sandbox,
    warden::{Answer, Asked, Programs, Question, Warden},
};

fn status(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/status")).unwrap()
}

fn start() -> std::sync::Arc<Warden> {
    let sublet = Path::new(env!("CARGO_BIN_EXE_sublet"));
    let programs = Programs {
        warden: sublet,
        worker: sublet,
        sandbox: Sandbox::On,
    };
    Warden::start(&programs, None).unwrap()
}

#[test]
fn warden_has_three_rights_of_root_at_most_and_nothing_but_its_channel_and_its_workers_none() {
    let rig = Rig::new();
    rig.borrow().unwrap();
    let pid = rig.wardens[1].pid();
    let few = match geteuid().is_root() {
        // SYSLOG, SYS_PTRACE and KILL.
        true => "0000000400080020",
        false => "0000000000000000",
    };
    for line in [
        &format!("CapEff:\t{few}"),
        &format!("CapPrm:\t{few}"),
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Threads:\t1",
    ] {
        let status = status(pid);
        assert!(
            !geteuid().is_root() && line.starts_with("CapBnd") || status.contains(line),
            "{line} is not in {status}"
        );
    }
    // Its channel (and stdin, which it came by), and the socket of the VMM.
    let held = descriptors(pid);
    let sockets = held.iter().filter(|target| target.starts_with("socket:"));
    assert_eq!(sockets.count(), 3, "{held:?}");
    let worker = status(rig.worker().pid);
    for line in ["CapPrm:\t0000000000000000", &format!("PPid:\t{pid}")] {
        assert!(worker.contains(line), "{line} is not in {worker}");
    }
    rig.end();
}

#[test]
fn warden_passes_over_signals_to_all_and_ends_with_its_port() {
    let warden = start();
    let pid = warden.pid();
    for all in [Signal::TERM, Signal::INT] {
        signal(pid, all);
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("folder/vfio-user.sock");
    let endpoint = warden.listen(&path, true).unwrap();
    assert!(path.exists());
    let second = warden.listen(&path, true).unwrap_err();
    assert_eq!(second.code, ErrorCode::Socket, "{second}");
    drop(endpoint);
    assert!(
        !dir.path().join("folder").exists(),
        "gone with its endpoint"
    );
    let nowhere = warden.listen(&dir.path().join("no/such.sock"), false);
    assert_eq!(nowhere.unwrap_err().code, ErrorCode::Socket);
    drop(warden);
    assert!(!lives(pid));
}

#[test]
fn what_nobody_waits_for_any_more_is_undone() {
    let (channel, theirs) = Channel::pair().unwrap();
    sublet::jail::keep_from_children();
    let dir = tempfile::tempdir().unwrap();
    let worker = dir.path().join("worker.sh");
    fs::write(&worker, "#!/bin/sh\nexec sleep 600\n").unwrap();
    fs::set_permissions(&worker, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_sublet"));
    command.args(["warden", "--worker"]).arg(worker);
    let mut child = command.stdin(theirs.into_fd()).spawn().unwrap();
    drop(command);
    let path = dir.path().join("vf.sock");
    let (ours, theirs) = Channel::pair().unwrap();
    let listen = || Question::Listen(path.clone(), false);
    for question in [listen(), Question::Start(theirs.into_fd())] {
        // Its answer has nowhere to go.
        let reply = Channel::pair().unwrap().0.into_fd();
        channel.say(&Asked { reply, question }, true).unwrap();
    }
    let gone = ours.wait(Duration::from_secs(60)).unwrap();
    assert!(
        gone && ours.hear::<Answer>().unwrap().is_none(),
        "the worker lives"
    );
    let again = until("the socket is nobody's", || {
        let (answered, reply) = Channel::pair().unwrap();
        let (reply, question) = (reply.into_fd(), listen());
        channel.say(&Asked { reply, question }, true).unwrap();
        let answer = answered.hear::<Answer>().unwrap().unwrap();
        matches!(answer, Answer::Opened(_)).then_some(answer)
    });
    drop((again, channel));
    assert!(child.wait().unwrap().success());
}

#[test]
fn killed_warden_costs_what_is_borrowed_and_the_port_says_so() {
    let rig = Rig::new();
    rig.borrow().unwrap();
    let mut vmm = Vmm::start(&rig).unwrap();
    vmm.work().unwrap();
    let worker = rig.worker().pid;
    let warden = rig.wardens[1].pid();
    signal(warden, Signal::KILL);
    until("no worker without its warden", || {
        (!lives(worker)).then_some(())
    });
    rig.wait_clean();
    until("a lost lease", || {
        (rig.borrowed().state == "lost").then_some(())
    });
    let refused = rig.borrow().unwrap_err();
    let words = format!("the port's warden (process {warden}) does not answer");
    assert!(refused.text.contains(&words), "{refused}");
    assert!(refused.text.contains("start the port again"), "{refused}");
    rig.wait_clean();
    rig.end();
}
