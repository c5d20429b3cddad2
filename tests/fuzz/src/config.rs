//! Any text is a configuration, or is refused with a place, a cause and a mend.

use std::path::Path;
use sublet::config::{Config, ConfigError};

pub(super) fn target(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    match Config::parse(Path::new("sublet.toml"), &text) {
        Ok(_) => {}
        Err(ConfigError::Content {
            line,
            column,
            cause,
            mend,
            ..
        }) => {
            let lines = text.split('\n').count();
            assert!((1..=lines).contains(&line), "line {line} of {lines}");
            assert!(column >= 1, "column {column}");
            assert!(!cause.is_empty() && !mend.is_empty(), "{cause}; {mend}");
        }
        Err(other) => panic!("a text has no {other}"),
    }
}
