//! The NTB between the two hosts: the model as a foreign process, or one that already listens.

use crate::cache::Cache;
use crate::log::Log;
use crate::program::Program;
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const READY_TIMEOUT: Duration = Duration::from_secs(10);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The two ends of a cable.
pub struct Ntb {
    /// The socket of host A's half.
    pub socket_a: PathBuf,
    /// The socket of host B's half.
    pub socket_b: PathBuf,
    control: Option<PathBuf>,
    model: Option<Program>,
}

impl Ntb {
    /// An NTB that is not ours: it listens already, and cannot be asked anything.
    pub fn foreign(socket_a: PathBuf, socket_b: PathBuf) -> Self {
        Ntb {
            socket_a,
            socket_b,
            control: None,
            model: None,
        }
    }

    /// Starts the model with these options and waits until it listens; the name is of its files.
    pub fn model(
        cache: &Cache,
        dir: &Path,
        name: &str,
        options: &[&str],
        since: Instant,
    ) -> Result<Self> {
        let at = |what: &str| dir.join(format!("{name}-{what}"));
        let (socket_a, socket_b, control) = (at("a.sock"), at("b.sock"), at("control.sock"));
        let mut argv = vec![cache.binary("ntb-model")?.display().to_string()];
        for (flag, path) in [
            ("--socket-a", &socket_a),
            ("--socket-b", &socket_b),
            ("--control", &control),
        ] {
            argv.push(flag.to_owned());
            argv.push(path.display().to_string());
        }
        argv.extend(options.iter().map(|option| option.to_string()));
        let program = Program::start(name, &argv, Log::new(at("model.log"), since))?;
        program.log.wait_for("ready", READY_TIMEOUT)?;
        Ok(Ntb {
            socket_a,
            socket_b,
            control: Some(control),
            model: Some(program),
        })
    }

    /// Asks the model: one JSON line there, one back.
    pub fn ask(&self, question: &Value) -> Result<Value> {
        let path = self
            .control
            .as_ref()
            .context("a foreign NTB has no control socket")?;
        let mut stream =
            UnixStream::connect(path).context("cannot reach the model's control socket")?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        writeln!(stream, "{question}")?;
        let mut line = String::new();
        BufReader::new(stream)
            .read_line(&mut line)
            .context("no answer from the model")?;
        let answer: Value =
            serde_json::from_str(&line).with_context(|| format!("the model answered `{line}`"))?;
        ensure!(answer.get("error").is_none(), "the model answered {answer}");
        Ok(answer)
    }

    /// What each half has done so far.
    pub fn counters(&self) -> Result<Value> {
        self.ask(&json!({ "op": "counters" }))
    }

    /// What a half's host lets the NTB reach: every map that its IOMMU holds for it.
    pub fn maps(&self, half: Half) -> Result<Value> {
        self.ask(&json!({ "op": "maps", "half": half }))
    }

    /// Takes the link down for a while.
    pub fn flap(&self, down_ms: u64) -> Result<()> {
        self.ask(&json!({ "op": "flap", "ms": down_ms })).map(drop)
    }

    /// Whether it is the project's own model, which can be asked.
    pub fn is_model(&self) -> bool {
        self.model.is_some()
    }
}

/// One end of the cable.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Half {
    /// The lender's.
    A,
    /// The borrower's.
    B,
}
