//! The other process of a benchmark: the same binary in another role, ended with its guard.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

const ROLE: &str = "SUBLET_BENCH_ROLE";

/// What a process of a benchmark does.
#[derive(Clone, Debug)]
pub struct Role {
    /// Its name.
    pub name: String,
    /// Where it listens.
    pub socket: PathBuf,
}

impl Role {
    /// The role that this process was started in; none = it measures.
    pub fn mine() -> Option<Self> {
        let words = env::var(ROLE).ok()?;
        // Whatever becomes of the process that measures, this one does not stay.
        let signal = Some(rustix::process::Signal::KILL);
        rustix::process::set_parent_process_death_signal(signal).expect("PR_SET_PDEATHSIG");
        let (name, socket) = words.split_once(' ')?;
        Some(Self {
            name: name.to_owned(),
            socket: socket.into(),
        })
    }

    /// Tells the process that measures that it can begin.
    pub fn ready(&self) {
        println!("ready");
    }
}

/// A process in a role. It is killed when this is dropped, and when the thread that started it ends.
pub struct Child(std::process::Child);

impl Child {
    /// Starts this binary in a role, and returns when it is ready.
    pub fn start(name: &str, socket: &Path) -> Self {
        let exe = env::current_exe().expect("this binary has a path");
        let mut child = Command::new(exe)
            .env(ROLE, format!("{name} {}", socket.display()))
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let stdout = child.stdout.take().expect("a pipe was asked for");
        let mut line = String::new();
        BufReader::new(stdout)
            .read_line(&mut line)
            .expect("a line of the other process");
        assert_eq!(line, "ready\n", "the {name} process did not start");
        Self(child)
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How long all threads of a process have run, nanoseconds.
pub fn cpu_ns(process: u32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("the process lives");
    let ran = |task: fs::DirEntry| -> Option<u64> {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_ascii_whitespace().next()?.parse().ok()
    };
    tasks.flatten().filter_map(ran).sum()
}
