//! Says how much of each source that a fuzz target is for its inputs reach, and whether that meets the goal.
//!
//! `coverage FILE`: what `llvm-cov export -summary-only` wrote of a replay.

use fuzz_targets::TARGETS;
use serde_json::Value;
use std::process::ExitCode;

/// Of the lines of a source that is held to it, in percent.
const GOAL: f64 = 95.0;

fn percent(files: &[Value], source: &str) -> Option<f64> {
    let of = |file: &&Value| {
        let name = file["filename"].as_str();
        name.is_some_and(|name| name.ends_with(&format!("/{source}")))
    };
    files.iter().find(of)?["summary"]["lines"]["percent"].as_f64()
}

fn main() -> ExitCode {
    let told = std::env::args_os().nth(1).and_then(|path| {
        let text = std::fs::read(path).ok()?;
        serde_json::from_slice::<Value>(&text).ok()
    });
    let files = told
        .as_ref()
        .and_then(|told| told["data"][0]["files"].as_array());
    let Some(files) = files else {
        eprintln!("coverage: give it the file of `llvm-cov export -summary-only`");
        return ExitCode::from(2);
    };
    let (mut passed, mut failed) = (0, 0);
    for target in TARGETS {
        for source in target.covers {
            let reached = percent(files, source);
            let met = reached.is_some_and(|reached| reached >= GOAL);
            let word = match (target.has_goal, met) {
                (false, _) => "    ",
                (true, true) => "ok  ",
                (true, false) => "FAIL",
            };
            let reached = reached.map_or("nothing".to_owned(), |percent| format!("{percent:.1} %"));
            println!("{word} {:12} {reached:>8} of {source}", target.name);
            passed += u32::from(target.has_goal && met);
            failed += u32::from(target.has_goal && !met);
        }
    }
    println!("{passed} passed, {failed} failed");
    ExitCode::from(u8::from(failed > 0))
}
