//! Errors of the configuration file: place, cause and mend.

use super::FILE_BYTES_MAX;
use std::{
    io,
    ops::Range,
    path::{Path, PathBuf},
};

/// Why the configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not there, or not to be read.
    #[error("cannot read the configuration {}: {source}; name a readable file with --config", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// Far too large for what it is.
    #[error("the configuration {} has {bytes} bytes and {FILE_BYTES_MAX} are the most; is it the right file?", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Something in it is wrong.
    #[error("{}:{line}:{column}: {cause}; {mend}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// What is wrong.
        cause: String,
        /// What would be right.
        mend: String,
    },
}

/// Turns byte spans of one file's text into places, and findings into errors.
#[derive(Clone, Copy)]
pub(super) struct Places<'a> {
    /// The file.
    pub path: &'a Path,
    /// Its text.
    pub text: &'a str,
}

impl Places<'_> {
    /// An error at the first byte of `span`.
    pub fn error(
        &self,
        span: Range<usize>,
        cause: impl Into<String>,
        mend: impl Into<String>,
    ) -> ConfigError {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        ConfigError::Content {
            path: self.path.to_owned(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            cause: cause.into(),
            mend: mend.into(),
        }
    }

    /// What the parser says, in our words where we have better ones.
    pub fn toml_error(&self, error: &toml::de::Error) -> ConfigError {
        let span = error.span().unwrap_or(0..0);
        let message = error.message().trim_end().replace('\n', ", ");
        let (cause, mend) = unknown_key(&message)
            .or_else(|| missing_key(&message))
            .or_else(|| wrong_type(&message))
            .unwrap_or((
                message,
                "see the sample files in tests/lab/config".to_owned(),
            ));
        self.error(span, cause, mend)
    }
}

/// The quoted words of serde's list of what it expected.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// The known word nearest to a mistyped one.
pub(super) fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .copied()
        .min_by_key(|candidate| strsim::damerau_levenshtein(word, candidate))
}

fn unknown_key(message: &str) -> Option<(String, String)> {
    let words = quoted(message.strip_prefix("unknown field ")?);
    let (key, known) = words.split_first()?;
    let nearest = nearest(key, known)?;
    Some((
        format!("unknown key `{key}`"),
        format!("the nearest known key is `{nearest}`"),
    ))
}

fn missing_key(message: &str) -> Option<(String, String)> {
    let key = *quoted(message.strip_prefix("missing field ")?).first()?;
    Some((
        format!("the key `{key}` is missing"),
        "add it to this table".to_owned(),
    ))
}

fn wrong_type(message: &str) -> Option<(String, String)> {
    let (found, expected) = message
        .strip_prefix("invalid type: ")?
        .rsplit_once(", expected ")?;
    let expected = match expected {
        "i64" => "an integer",
        "path string" => "a string",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        table if table.starts_with("struct ") => "a table",
        other => other,
    };
    Some((
        format!("wrong type: {found}"),
        format!("write {expected} here"),
    ))
}
