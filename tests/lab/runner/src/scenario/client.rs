//! A tenant without a guest, or a bystander without a function: started, told what to do, and asked what came of it.

use crate::agent::{Agent, SIGKILL};
use anyhow::{Context, Result, bail, ensure};
use std::time::{Duration, Instant};

/// Longer than the client itself waits for an answer.
const ORDER_TIMEOUT: Duration = Duration::from_secs(30);

/// Shell lines by which a machine has a bystander before any of its drivers is loaded.
pub const EARLY_BYSTANDER: &str = "mkfifo /run/bystander.orders\n\
    lab-agent vfio-user nobody vmm /run/bystander.orders 0 > /run/bystander.log 2>&1 &\n\
    echo $! > /run/bystander.pid";

/// The vfio-user client of `lab-agent`.
pub struct Client {
    agent: Agent,
    /// Its process.
    pub pid: u32,
    orders: String,
    log: String,
}

impl Client {
    /// Starts it for a socket; it does nothing yet.
    pub fn start(agent: &Agent, name: &str, socket: &str, lba: u64) -> Result<Self> {
        Client::start_with(agent, name, socket, &[&lba.to_string()])
    }

    fn start_with(agent: &Agent, name: &str, socket: &str, more: &[&str]) -> Result<Self> {
        let (orders, log) = (format!("/run/{name}.orders"), format!("/run/{name}.log"));
        agent.sh(&format!("mkfifo {orders}"))?;
        let mut argv = vec!["lab-agent", "vfio-user", socket, "vmm", &orders];
        argv.extend(more);
        let pid = agent.spawn(&argv, &log)?;
        Ok(Client {
            agent: agent.clone(),
            pid,
            orders,
            log,
        })
    }

    /// Starts one that has memory and no function: whoever reaches that is no friend.
    pub fn bystander(agent: &Agent) -> Result<Self> {
        Client::start(agent, "bystander", "nobody", 0)
    }

    /// The same with so many MiB of huge pages, all of them filled.
    pub fn huge_bystander(agent: &Agent, name: &str, mib: u64) -> Result<Self> {
        let client = Client::start_with(agent, name, "nobody", &["0", &mib.to_string()])?;
        client.look(0)?;
        Ok(client)
    }

    /// The one that [`EARLY_BYSTANDER`] has started. It is nobody's to wait for: it goes with its
    /// machine.
    pub fn early_bystander(agent: &Agent) -> Result<Self> {
        let pid = agent.text("/run/bystander.pid")?;
        Ok(Client {
            agent: agent.clone(),
            pid: pid.trim().parse().context("no process id")?,
            orders: "/run/bystander.orders".to_owned(),
            log: "/run/bystander.log".to_owned(),
        })
    }

    /// Its memory that nobody may write, and so far nobody has; once for each number.
    pub fn look(&self, number: u64) -> Result<()> {
        let looked = self.order(&format!("look {number}"));
        looked.map(drop).context("memory of no tenant")
    }

    /// Tells it to begin something.
    pub fn tell(&self, order: &str) -> Result<()> {
        let Client { pid, orders, .. } = self;
        // A FIFO without a reader would hold whoever writes to it.
        let line = format!("kill -0 {pid}; echo {order} > {orders}");
        self.agent.sh(&line).map(drop)
    }

    /// Waits until it has done so, failed, or is gone; its own words.
    pub fn ended(&self, order: &str) -> Result<String> {
        let Client { pid, log, .. } = self;
        let until = format!(
            "grep -qE '^done {order}|^failed' {log} || ! grep -q '^State:.[^Z]' /proc/{pid}/status"
        );
        self.agent
            .wait_until(&until, ORDER_TIMEOUT)
            .with_context(|| format!("`{order}` hangs"))?;
        let said = self.agent.text(log)?;
        let last = last_word(&said, order);
        Ok(last.unwrap_or("gone").to_owned())
    }

    /// The same of what must be done; how long it took by its own clock.
    pub fn done(&self, order: &str) -> Result<Duration> {
        let said = self.ended(order)?;
        let ms = said.strip_prefix(&format!("done {order} "));
        let ms = ms.and_then(|ms| ms.parse().ok());
        Ok(Duration::from_millis(ms.with_context(|| said)?))
    }

    /// Both.
    pub fn order(&self, order: &str) -> Result<Duration> {
        self.tell(order)?;
        self.done(order)
    }

    /// Whether it has done so, or failed, by now.
    pub fn has_ended(&self, order: &str) -> Result<bool> {
        Ok(last_word(&self.agent.text(&self.log)?, order).is_some())
    }

    /// How many pieces came back right; none may have come back wrong.
    pub fn pieces(&self) -> Result<u64> {
        let said = self.agent.text(&self.log)?;
        if let Some(failed) = said.lines().find(|line| line.contains("failed")) {
            bail!("{failed}");
        }
        Ok(said.lines().filter(|line| *line == "right").count() as u64)
    }

    /// As many more come back right from now on.
    pub fn goes_on(&self, more: u64) -> Result<()> {
        let (most, since) = (self.pieces()? + more, Instant::now());
        while self.pieces()? < most {
            ensure!(since.elapsed() < ORDER_TIMEOUT, "its I/O stands still");
        }
        Ok(())
    }

    /// It ends as a VMM that is done, and leaves its function running.
    pub fn end(self) -> Result<()> {
        self.tell("end")?;
        let code = self.agent.wait(self.pid, ORDER_TIMEOUT)?;
        ensure!(code == Some(0), "the client ended with {code:?}");
        self.clear_away()
    }

    /// Whatever is left of it goes; a dead one is no error.
    pub fn clear_away(self) -> Result<()> {
        let _ = self.agent.kill(self.pid, SIGKILL);
        self.agent.wait(self.pid, ORDER_TIMEOUT)?;
        let Client { orders, log, .. } = &self;
        self.agent.sh(&format!("rm {orders} {log}")).map(drop)
    }
}

/// What its log has of an order's end, or of its own.
fn last_word<'a>(said: &'a str, order: &str) -> Option<&'a str> {
    let done = format!("done {order}");
    let mut lines = said.lines().rev();
    lines.find(|line| line.starts_with("failed") || line.starts_with(&done))
}
