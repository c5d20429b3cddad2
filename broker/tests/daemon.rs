//! The daemon as a process: what it is left with, that `status` tells it, and that it needs each system call of its list.

#[allow(dead_code, reason = "each test program uses a part of it")]
mod apart;
#[allow(dead_code, reason = "each test program uses a part of it")]
mod shut;
#[allow(dead_code, reason = "each test program uses a part of it")]
mod soft;

use apart::{Daemon, Rig, ask, bdf};
use rustix::process::Signal;
use soft::{descriptors, signal, try_freeze};
use std::{
    env,
    fs::{self, File},
    os::unix::{net::UnixStream, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio, exit},
    time::Duration,
};
use sublet::{
    config::Config,
    daemon::{self, ROLE, host::Workers, vocabulary::*},
    jail::{Report, Sandbox, confine_but, keep_from_children},
};

/// What a child of this program is to be, and of which configuration.
const PART: &str = "SUBLET_DAEMON_TEST_PART";
const FILE: &str = "SUBLET_DAEMON_TEST_FILE";
const SUBLET: &str = env!("CARGO_BIN_EXE_sublet");

/// What the tests below start as a process of its own; not a test by itself.
#[test]
fn the_process_of_the_other_tests() {
    let Ok(part) = env::var(PART) else { return };
    let (part, without) = part.split_once(' ').unwrap_or((&part, ""));
    let file = PathBuf::from(env::var_os(FILE).unwrap());
    match part {
        "daemon" => {
            let ended = daemon::run(&file, Sandbox::On, shut::without(&ROLE, without));
            exit(i32::from(ended.is_err()));
        }
        "exercise" => {
            let config = Config::load(&file).unwrap();
            let kept = daemon::kept(&config, None);
            let confined = confine_but(
                shut::without(&ROLE, without),
                Sandbox::On,
                &[0, 1, 2],
                &kept,
            )
            .unwrap();
            confined.seal_before_threads().unwrap();
            shut::threads();
            exit(0);
        }
        "confined" => {
            let config = Config::load(&file).unwrap();
            let kept = daemon::kept(&config, None);
            drop(confine_but(&ROLE, Sandbox::On, &[0, 1, 2], &kept).unwrap());
            reaches_its_own_alone(&config);
            exit(0);
        }
        "old-kernel" => {
            let mut command = Command::new(SUBLET);
            command.args(["daemon", "--config"]).arg(file);
            shut::on_an_old_kernel(command);
        }
        other => panic!("{other}"),
    }
}

/// This program in a part.
fn part(part: &str, file: &Path) -> Command {
    let mut command = shut::this_program();
    command.env(PART, part).env(FILE, file);
    command.env("RUST_BACKTRACE", "1");
    command
}

/// A host with a port that nobody serves; its control socket is in a folder that is not there.
struct Alone {
    dir: tempfile::TempDir,
    control: PathBuf,
    file: PathBuf,
}

impl Alone {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let control = dir.path().join("run/control.sock");
        let text = format!(
            "[node]\nid = 4\nname = \"a\"\n[daemon]\ncontrol = {control:?}\nstate = {:?}\n\
             [[port]]\nname = \"ntb0\"\nbdf = \"02:00.0\"\npeers = \"cable\"\n\
             trust_domain = \"t\"\n",
            dir.path().join("state")
        );
        let file = dir.path().join("sublet.toml");
        fs::write(&file, text).unwrap();
        Self { dir, control, file }
    }

    fn start(&self, sandbox: &str) -> Daemon {
        let mut command = Command::new(SUBLET);
        let sandbox = format!("--sandbox={sandbox}");
        command
            .args(["daemon", &sandbox, "--config"])
            .arg(&self.file);
        Daemon::by(command, &self.file, &self.control).expect("a daemon")
    }

    /// Without what a killed one has left.
    fn clear(&self) {
        for folder in ["run", "state"].map(|name| self.dir.path().join(name)) {
            if folder.exists() {
                fs::remove_dir_all(folder).unwrap();
            }
        }
    }

    fn page(&self) -> String {
        let mut command = Command::new(SUBLET);
        let output = command.arg("--control").arg(&self.control).arg("status");
        String::from_utf8(output.output().unwrap().stdout).unwrap()
    }
}

#[test]
fn daemon_serves_from_a_sandbox_and_holds_nothing_but_its_own() {
    let rig = Rig::new(&["ntb0"]);
    rig.offer(0, "ntb0");
    rig.borrow(0).unwrap();
    let daemon = &rig.lender;
    let told = daemon.status().node.sandbox.expect("a process of its own");
    assert!(told.is_closed(), "{told:?}");
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    shut::assert_shut_in(&status);
    let mut held = descriptors(daemon.pid());
    held.retain(|target| !target.starts_with("socket:") && !target.starts_with("pipe:"));
    held.retain(|target| !target.starts_with("anon_inode:[eventfd]"));
    let store = rig.lender_config().state.join("leases.redb");
    held.retain(|target| Path::new(target) != store && target != "/dev/null");
    assert_eq!(held, Vec::<String>::new());
}

#[test]
fn sandbox_is_told_shut_or_off() {
    let alone = Alone::new();
    let shut = alone.start("on");
    assert!(shut.status().node.sandbox.unwrap().is_closed());
    let page = alone.page();
    assert!(page.contains(", in its sandbox\n"), "{page}");
    assert!(shut.stop().success());
    let off = alone.start("off");
    assert_eq!(off.status().node.sandbox, Some(Report::default()));
    let page = alone.page();
    let words = format!("process {} runs without a sandbox", off.pid());
    assert!(page.contains(&words), "{page}");
    assert!(off.stop().success());
}

#[test]
fn kernel_without_landlock_is_refused_and_no_socket_is_left() {
    let alone = Alone::new();
    keep_from_children();
    let mut command = part("old-kernel", &alone.file);
    let output = command.stdin(Stdio::null()).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(words.contains("--sandbox=off"), "{words}");
    assert!(!output.status.success() && !alone.control.exists());
}

#[test]
fn confined_daemon_reaches_its_store_and_its_run_folder_alone() {
    let alone = Alone::new();
    let status = run(part("confined", &alone.file), &alone);
    assert!(status.success(), "{status}");
}

fn reaches_its_own_alone(config: &Config) {
    let run = config.control.parent().unwrap();
    let (store, socket) = (config.state.join("file"), run.join("control.sock"));
    fs::write(&store, "words").unwrap();
    assert_eq!(fs::read(&store).unwrap(), b"words");
    assert!(File::open("/proc/self/status").is_err(), "another file");
    assert!(
        File::create(run.join("file")).is_err(),
        "one in its run folder"
    );
    assert!(fs::read_dir(run).is_err(), "what lies there");
    assert!(fs::create_dir(config.state.join("folder")).is_err());
    assert!(fs::remove_file(run.with_file_name("sublet.toml")).is_err());
    fs::remove_file(&socket).unwrap();
}

/// Runs a part that ends by itself, for a daemon whose folders are there already.
fn run(command: Command, alone: &Alone) -> ExitStatus {
    alone.clear();
    let run = alone.control.parent().unwrap();
    for folder in [run, &alone.dir.path().join("state")] {
        fs::create_dir_all(folder).unwrap();
    }
    File::create(&alone.control).unwrap();
    shut::ended(command)
}

#[test]
fn each_system_call_of_the_daemon_is_needed() {
    let alone = Alone::new();
    let whole = run(part("exercise all", &alone.file), &alone);
    assert_eq!(whole.code(), Some(0), "{whole}");
    life_alone(&alone, "none of them").expect("the whole list is enough");
    let functions = 1 + ROLE.calls.len();
    let mut rig = Rig::with_functions(&["ntb0", "ntb1"], functions, Workers::Threads);
    rig.stop_port(4, "ntb1");
    life(&mut rig, 0, "none of them").expect("the whole list is enough");
    let mut idle = Vec::new();
    for (at, call) in ROLE.calls.iter().enumerate() {
        let part = part(&format!("exercise {}", call.name), &alone.file);
        if run(part, &alone).signal() == Some(shut::SIGSYS)
            || life_alone(&alone, call.name).is_err()
        {
            continue;
        }
        if life(&mut rig, 1 + at, call.name).is_ok() {
            idle.push(call.name);
        }
    }
    assert!(idle.is_empty(), "nothing needs {idle:?}");
}

/// A daemon's life without ports: it is frozen for a while, and ends as it is told to.
fn life_alone(alone: &Alone, without: &str) -> Result<(), String> {
    alone.clear();
    let command = part(&format!("daemon {without}"), &alone.file);
    let daemon = Daemon::by(command, &alone.file, &alone.control);
    let daemon = daemon.ok_or("it does not begin")?;
    told(&alone.control, Verb::Status)?;
    try_freeze(daemon.pid())?;
    signal(daemon.pid(), Signal::CONT);
    // One that stays is not heard any more.
    let client = UnixStream::connect(&alone.control).map_err(|error| error.to_string())?;
    let answer = daemon::ask::ask(&client, &Verb::Status, Duration::from_secs(60));
    answer.map_err(|error| error.to_string())?.unwrap();
    let ended = daemon.stop();
    match ended.success() && !alone.control.parent().unwrap().exists() {
        true => Ok(()),
        false => Err(format!("it ends with {ended}")),
    }
}

fn told(control: &Path, verb: Verb) -> Result<Outcome, String> {
    let answer = ask(control, &verb).map_err(|error| error.to_string())?;
    answer.map_err(|refusal| refusal.text)
}

/// A daemon's life with a port: it lends this function, which comes back, and is killed.
fn life(rig: &mut Rig, at: usize, without: &str) -> Result<(), String> {
    rig.lender.kill();
    let command = part(&format!("daemon {without}"), &rig.lender.file);
    let daemon = rig.start_lender_by(command).ok_or("it does not begin")?;
    rig.lender = daemon;
    let control = rig.lender_config().control;
    let bdf = bdf(at);
    let port = Some("ntb0".to_owned());
    told(&control, Verb::Add { bdf })?;
    told(&control, Verb::Available { bdf, port })?;
    rig.borrow(at).map_err(|refusal| refusal.text)?;
    told(&control, Verb::List)?;
    rig.give_back(at).map_err(|refusal| refusal.text)?;
    told(&control, Verb::Unavailable { bdf })?;
    told(&control, Verb::Remove { bdf })?;
    Ok(())
}
