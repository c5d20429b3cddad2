//! The project's own daemons and ports on both hosts, and the way of one function from the lender to a guest.

use crate::agent::{Agent, Output, SIGKILL, SIGTERM};
use crate::host::{Host, NTB_BDF, VF_BDF};
use crate::lab::{Lab, Pair};
use crate::pci;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// The sample configurations, which are also the documentation of what a file may say.
const CONFIGS: [&str; 2] = ["a.toml", "b.toml"];
const CONFIG_DIR: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../config");
/// The verbs' socket of the sample configurations' port, which answers without a daemon.
const PORT_CONTROL: &str = "/run/sublet/ports/ntb0/control.sock";
/// The sample configurations' port.
pub const PORT: &str = "ntb0";
const END_TIMEOUT: Duration = Duration::from_secs(20);
const LINK_TIMEOUT: Duration = Duration::from_secs(30);
const VERB_TIMEOUT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(200);

/// Whom the sample configurations' keeper serves, and the folders that a supervisor makes for it.
pub const USER: &str = "1000";
const FOLDERS: &str = "/run/sublet /var/lib/sublet";
const KEEPER_FOLDER: &str = "/run/sublet-keeper";

/// The text of a sample configuration.
pub fn config(name: &str) -> Result<String> {
    let from = Path::new(CONFIG_DIR).join(name);
    fs::read_to_string(&from).with_context(|| format!("cannot read {}", from.display()))
}

/// A sample configuration's text with other values for some keys (`key = `, each on a line of its own).
pub fn edited(config: &str, edits: &[(&str, &str)]) -> String {
    let line = |line: &str| {
        let edit = edits.iter().find(|(key, _)| line.starts_with(key));
        edit.map_or_else(
            || format!("{line}\n"),
            |(key, value)| format!("{key}{value}\n"),
        )
    };
    config.lines().map(line).collect()
}

/// What runs as a process of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Workers {
    /// Nothing: the daemon is port and workers, too.
    #[default]
    Threads,
    /// Daemon, port, and each worker in its sandbox.
    Processes,
    /// The same, and the daemon is no root either: it has its functions by a keeper.
    Kept,
}

/// How a program is started as the user without rights, if it is.
fn user_of(kept: bool) -> Vec<&'static str> {
    match kept {
        true => vec!["lab-agent", "as", USER],
        false => Vec::new(),
    }
}

/// A daemon on one host, with its port.
pub struct Daemon {
    agent: Agent,
    pid: u32,
    /// The port's process, where it is another.
    port: Option<u32>,
    /// Whether one was killed, and has left its folder behind.
    port_killed: bool,
    kept: bool,
    program: String,
    config: String,
    log: String,
    port_log: String,
    name: String,
}

impl Daemon {
    /// Starts it, its workers as threads, with a configuration that lies in the share.
    pub fn start(host: &Host, program: &str, config: &str) -> Result<Self> {
        Self::start_as(host, program, config, Workers::Threads)
    }

    /// Starts it with a configuration that lies in the share.
    pub fn start_as(host: &Host, program: &str, config: &str, workers: Workers) -> Result<Self> {
        let log = host.shared(&format!("daemon-{}.log", host.name));
        let kept = workers == Workers::Kept;
        if kept {
            let made = format!("mkdir -p {FOLDERS}; chown {USER}:{USER} {FOLDERS}");
            host.agent.sh(&made)?;
        }
        let mut daemon = Daemon {
            agent: host.agent.clone(),
            pid: 0,
            port: None,
            port_killed: false,
            kept,
            program: program.to_owned(),
            config: config.to_owned(),
            log,
            port_log: host.shared(&format!("port-{}.log", host.name)),
            name: host.name.clone(),
        };
        if workers != Workers::Threads {
            daemon.start_port()?;
        }
        daemon.spawn()?;
        Ok(daemon)
    }

    /// Starts its port, again after that was killed, and waits until it answers.
    pub fn start_port(&mut self) -> Result<()> {
        self.port = Some(self.start_port_named(PORT)?);
        Ok(())
    }

    /// The same of any port of its configuration; its process id.
    pub fn start_port_named(&self, name: &str) -> Result<u32> {
        let mut argv = user_of(self.kept);
        let program = self.program.as_str();
        argv.extend([program, "port", name, "--config", &self.config]);
        let pid = self.agent.spawn(&argv, &self.port_log)?;
        // A killed one has left its socket behind.
        let control = format!("/run/sublet/ports/{name}/control.sock");
        let ask = format!("{program} --control {control} list >/dev/null 2>&1");
        let up = format!("while ! {ask}; do kill -0 {pid}; usleep 50000; done");
        self.agent.sh(&up).context("the port does not answer")?;
        Ok(pid)
    }

    /// Ends its port as an operator does, and starts it again.
    pub fn restart_port(&mut self) -> Result<()> {
        self.end(self.port.context("its port is no process of its own")?)?;
        self.start_port()
    }

    /// Kills its port, as `kill -9` does.
    pub fn kill_port(&mut self) -> Result<()> {
        let port = self.port.context("its port is no process of its own")?;
        self.port_killed = true;
        self.agent.kill(port, SIGKILL)?;
        self.agent.wait(port, END_TIMEOUT).map(drop)
    }

    fn spawn(&mut self) -> Result<()> {
        let mut argv = user_of(self.kept);
        argv.extend([self.program.as_str(), "daemon", "--config", &self.config]);
        argv.extend(self.port.is_none().then_some("--in-process"));
        self.pid = self.agent.spawn(&argv, &self.log)?;
        // A killed one has left its socket behind: only an answer tells that one is there.
        let (program, pid) = (&self.program, self.pid);
        let up =
            format!("while ! {program} list >/dev/null 2>&1; do kill -0 {pid}; usleep 50000; done");
        self.agent
            .sh(&up)
            .context("the daemon does not answer")
            .map(drop)
    }

    /// Kills it, and not its port, as `kill -9` does.
    pub fn kill(&self) -> Result<()> {
        ensure!(self.port.is_some(), "it is its port, too");
        self.agent.kill(self.pid, SIGKILL)?;
        self.agent.wait(self.pid, END_TIMEOUT).map(drop)
    }

    /// Another daemon in its place, of this program.
    pub fn start_again(&mut self, program: &str) -> Result<()> {
        self.program = program.to_owned();
        self.spawn()
    }

    /// Ends it, and not its port, and starts another one of this program.
    pub fn replace(&mut self, program: &str) -> Result<()> {
        ensure!(self.port.is_some(), "it is its port, too");
        self.end(self.pid)?;
        self.start_again(program)
    }

    /// The file that its process runs.
    pub fn running(&self) -> Result<String> {
        let link = self.agent.sh(&format!("readlink /proc/{}/exe", self.pid))?;
        Ok(link.trim().to_owned())
    }

    /// That it and its port are in their sandboxes: what they say, and what the kernel says.
    pub fn ensure_shut_in(&self) -> Result<()> {
        let status = self.status()?;
        let port = self.port;
        let port = port.map(|pid| (pid, &status["ports"][0]["process"]["sandbox"]));
        let own = (self.pid, &status["node"]["sandbox"]);
        for (pid, sandbox) in [own].into_iter().chain(port) {
            for part in ["landlock", "seccomp"] {
                ensure!(sandbox[part] == true, "host {}: {sandbox}", self.name);
            }
            let told = self.agent.text(&format!("/proc/{pid}/status"))?;
            for line in ["CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
                ensure!(told.contains(line), "{line} is not in {told}");
            }
        }
        let page = self.verb(&["status"])?;
        ensure!(page.contains(", in its sandbox"), "{page}");
        Ok(())
    }

    /// What its port says of itself, without it.
    pub fn port_status(&self) -> Result<Value> {
        let text = self.verb(&["--control", PORT_CONTROL, "status", "--json"])?;
        serde_json::from_str(&text)
            .with_context(|| format!("status of a port of host {} is no JSON: {text}", self.name))
    }

    /// Its process id on the host.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its port's, where that is a process of its own.
    pub fn port_pid(&self) -> Option<u32> {
        self.port
    }

    /// Runs a verb that must succeed.
    pub fn verb(&self, words: &[&str]) -> Result<String> {
        let mut argv = vec![self.program.as_str()];
        argv.extend(words);
        self.agent.run(&argv)
    }

    /// Runs a verb, whatever comes of it.
    pub fn try_verb(&self, words: &[&str], timeout: Duration) -> Result<Output> {
        let mut argv = vec![self.program.as_str()];
        argv.extend(words);
        self.agent.try_run(&argv, &[], timeout)
    }

    /// Runs a verb that must be refused with this code; the words of the refusal.
    pub fn refusal(&self, code: &str, words: &[&str]) -> Result<String> {
        let mut argv = vec!["--json"];
        argv.extend(words);
        let output = self.try_verb(&argv, VERB_TIMEOUT)?;
        let answer: Value = serde_json::from_str(&output.stdout)
            .with_context(|| format!("no JSON: {} {}", output.stdout, output.stderr))?;
        let error = &answer["error"];
        ensure!(error["code"] == code, "not refused as {code}: {answer}");
        ensure!(output.code != Some(0), "refused, and yet with exit code 0");
        Ok(error["text"].as_str().unwrap_or_default().to_owned())
    }

    /// What it says of itself, counters included.
    pub fn status(&self) -> Result<Value> {
        let text = self.verb(&["status", "--json"])?;
        serde_json::from_str(&text)
            .with_context(|| format!("status of host {} is no JSON: {text}", self.name))
    }

    /// Waits until its status is as wanted.
    pub fn wait_status(
        &self,
        what: &str,
        timeout: Duration,
        is: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let deadline = Instant::now() + timeout;
        loop {
            let status = self.status()?;
            if is(&status) {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("host {}: no {what} within {timeout:?}: {status}", self.name);
            }
            std::thread::sleep(POLL);
        }
    }

    /// Offers a function through one of its ports; its fabric device id, as the host at the other
    /// end sees it. It must be the only one that is available there.
    pub fn offer(&self, bdf: &str, port: &str, to: &Daemon) -> Result<String> {
        self.verb(&["add", bdf])?;
        self.verb(&["available", bdf, "--port", port])?;
        let list = to.verb(&["list"])?;
        let line = list.lines().find(|line| line.contains("[available]"));
        let fdid = line.and_then(|line| line.split(':').next());
        Ok(fdid
            .with_context(|| format!("nothing to borrow: {list}"))?
            .to_owned())
    }

    /// Waits until its first port has agreed on a session with its peer.
    pub fn wait_link(&self) -> Result<()> {
        self.wait_status("session", LINK_TIMEOUT, |status| {
            status["ports"][0]["session"]["state"] == "open"
        })
        .map(drop)
    }

    /// Ends it as an operator does, and its port.
    pub fn stop(self) -> Result<()> {
        self.end(self.pid)?;
        self.port.map_or(Ok(()), |port| self.end(port))?;
        if self.port_killed {
            // Empty, or it stays and is seen.
            self.agent
                .sh("rmdir /run/sublet/ports/* /run/sublet/ports 2>/dev/null || :")?;
        }
        Ok(())
    }

    /// Ends a process of it as an operator does.
    pub fn end(&self, pid: u32) -> Result<()> {
        self.agent.kill(pid, SIGTERM)?;
        let code = self.agent.wait(pid, END_TIMEOUT)?;
        ensure!(
            code == Some(0),
            "process {pid} of host {} ended with {code:?}",
            self.name
        );
        Ok(())
    }
}

/// A keeper on one host, as root.
pub struct Keeper {
    agent: Agent,
    argv: [String; 4],
    log: String,
    pid: u32,
}

impl Keeper {
    /// Starts it with a configuration that lies in the share.
    pub fn start(host: &Host, program: &str, config: &str) -> Result<Self> {
        let argv = [program, "keeper", "--config", config].map(str::to_owned);
        let log = host.shared(&format!("keeper-{}.log", host.name));
        let mut keeper = Keeper {
            agent: host.agent.clone(),
            argv,
            log,
            pid: 0,
        };
        keeper.begin()?;
        Ok(keeper)
    }

    /// Starts it, again after it was killed.
    pub fn begin(&mut self) -> Result<()> {
        let argv: Vec<&str> = self.argv.iter().map(String::as_str).collect();
        self.pid = self.agent.spawn(&argv, &self.log)?;
        // Its sandbox is shut when it says so, behind what a killed one left.
        let pid = self.pid;
        self.agent
            .sh(&format!(
                "until grep -q '^Seccomp:.2' /proc/{pid}/status; do kill -0 {pid}; usleep 50000; done"
            ))
            .context("the keeper does not serve")?;
        Ok(())
    }

    /// Its process id on the host.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Kills it.
    pub fn kill(&self) -> Result<()> {
        self.agent.kill(self.pid, SIGKILL)?;
        self.agent.wait(self.pid, END_TIMEOUT).map(drop)
    }

    fn stop(self) -> Result<()> {
        self.agent.kill(self.pid, SIGTERM)?;
        let code = self.agent.wait(self.pid, END_TIMEOUT)?;
        ensure!(code == Some(0), "the keeper ended with {code:?}");
        // What a supervisor made, and takes away; nothing else may be in the folders.
        self.agent.sh(&format!(
            "rmdir {KEEPER_FOLDER}/bound {KEEPER_FOLDER} /run/sublet"
        ))?;
        Ok(())
    }
}

/// Both hosts with a VF made, everything bound, and both daemons running.
pub struct Lending {
    /// The lender's.
    pub a: Daemon,
    /// The borrower's.
    pub b: Daemon,
    /// Of the lender and of the borrower, where they have some.
    pub keepers: Vec<Keeper>,
}

impl Lending {
    /// Makes a VF with these queues and interrupts, binds, and starts both daemons.
    pub fn start(lab: &Lab, pair: &Pair, queues: u32, interrupts: u32) -> Result<Self> {
        let workers = Workers::Threads;
        Self::start_with(lab, pair, (queues, interrupts), (0, workers), str::to_owned)
    }

    /// The same, with more VFs after that one (they have no queues and stay offline), and with
    /// other configurations than the samples.
    pub fn start_with(
        lab: &Lab,
        pair: &Pair,
        (queues, interrupts): (u32, u32),
        (more_vfs, workers): (u32, Workers),
        edit: impl Fn(&str) -> String,
    ) -> Result<Self> {
        let program = lab.share_binary("sublet")?;
        for name in CONFIGS {
            fs::write(lab.dir.join(name), edit(&config(name)?))?;
        }
        pci::make_vfs(&pair.a.agent, 1 + more_vfs)?;
        pci::nvme_online(&pair.a.agent, 1, queues, interrupts)?;
        let configs = [
            (&pair.a, pair.a.shared("a.toml")),
            (&pair.b, pair.b.shared("b.toml")),
        ];
        let mut keepers = Vec::new();
        if workers == Workers::Kept {
            for (host, config) in &configs {
                keepers.push(Keeper::start(host, &program, config)?);
            }
        } else {
            pci::bind(&pair.a.agent, NTB_BDF, "vfio-pci")?;
            pci::bind(&pair.b.agent, NTB_BDF, "vfio-pci")?;
            pci::bind(&pair.a.agent, VF_BDF, "vfio-pci")?;
        }
        Ok(Lending {
            keepers,
            a: Daemon::start_as(&pair.a, &program, &pair.a.shared("a.toml"), workers)?,
            b: Daemon::start_as(&pair.b, &program, &pair.b.shared("b.toml"), workers)?,
        })
    }

    /// Waits until both ports have agreed on a session.
    pub fn wait_link(&self) -> Result<&'static str> {
        self.a.wait_link()?;
        self.b.wait_link()?;
        Ok("")
    }

    /// Puts the VF into the pool; its fabric device id.
    pub fn offer(&self) -> Result<String> {
        self.offer_function(VF_BDF)
    }

    /// The same of any function; it must be the only one that is available.
    pub fn offer_function(&self, bdf: &str) -> Result<String> {
        self.a.offer(bdf, PORT, &self.b)
    }

    /// Borrows it for a VMM that will connect to this socket.
    pub fn borrow(&self, fdid: &str, socket: &str, more: &[&str]) -> Result<String> {
        let mut words = vec!["borrow", fdid, "--socket", socket];
        words.extend(more);
        self.b.verb(&words)
    }

    /// Ends both daemons and takes the VF and the bindings away: as before [`Lending::start`].
    pub fn end(self, pair: &Pair) -> Result<()> {
        self.b.stop()?;
        self.a.stop()?;
        if self.keepers.is_empty() {
            pci::unbind(&pair.a.agent, VF_BDF)?;
            pci::unbind(&pair.a.agent, NTB_BDF)?;
            pci::unbind(&pair.b.agent, NTB_BDF)?;
        } else {
            pci::wait_unbound(&pair.a.agent, VF_BDF)?;
            pci::wait_unbound(&pair.a.agent, NTB_BDF)?;
            pci::wait_unbound(&pair.b.agent, NTB_BDF)?;
        }
        for keeper in self.keepers {
            keeper.stop()?;
        }
        pci::nvme_offline(&pair.a.agent, 1)?;
        pci::remove_vfs(&pair.a.agent)
    }
}

/// Sum of the counts of all vectors of a device, in whichever machine the agent runs.
pub fn interrupt_count(agent: &Agent, bdf: &str) -> Result<u64> {
    let lines: Value = serde_json::from_str(&agent.run(&["lab-agent", "interrupts", bdf])?)?;
    let lines = lines.as_array().context("no list of interrupts")?;
    Ok(lines.iter().filter_map(|line| line["count"].as_u64()).sum())
}

/// What a driver says when interrupts are lost; none of it may stand in a guest's log.
pub fn ensure_no_lost_interrupt(dmesg: &str) -> Result<&'static str> {
    let lost = dmesg.lines().find(|line| {
        let line = line.to_lowercase();
        line.contains("completion polled") || (line.contains("nvme") && line.contains("timeout"))
    });
    match lost {
        None => Ok(""),
        Some(line) => bail!("the guest's log says: {line}"),
    }
}

/// A counter of the first function that a host lends (`lent`) or has borrowed (`borrowed`), summed
/// over its vectors.
pub fn vector_sum(status: &Value, side: &str, counter: &str) -> Result<u64> {
    let vectors = status[side][0]["vectors"].as_array();
    let vectors = vectors.with_context(|| format!("nothing {side} in {status}"))?;
    let counts = vectors.iter().map(|vector| vector[counter].as_u64());
    counts
        .sum::<Option<u64>>()
        .with_context(|| format!("no counter {counter} in {status}"))
}

/// BAR accesses that went through the worker of the first borrowed function.
pub fn trapped_accesses(status: &Value) -> Result<u64> {
    let counters = &status["borrowed"][0]["counters"];
    let both = ["trapped_reads", "trapped_writes"].map(|name| counters[name].as_u64());
    let sum = both.into_iter().sum::<Option<u64>>();
    sum.with_context(|| format!("no counters of a guest session in {status}"))
}
