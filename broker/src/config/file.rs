//! What the configuration file says, word by word; nothing is judged here but keys and types.

use serde::{Deserialize, Deserializer, de};
use std::fmt;
use toml::Spanned;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct File {
    pub node: Node,
    #[serde(default)]
    pub daemon: Daemon,
    #[serde(default)]
    pub keeper: Keeper,
    #[serde(default)]
    pub port: Vec<Port>,
    #[serde(default)]
    pub limits: Limits,
    #[serde(default)]
    pub policy: Policy,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Node {
    pub id: Spanned<i64>,
    pub name: Spanned<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Daemon {
    pub control: Option<Spanned<String>>,
    pub sockets: Option<Spanned<String>>,
    pub state: Option<Spanned<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Keeper {
    pub folder: Option<Spanned<String>>,
    pub user: Option<Spanned<String>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Port {
    pub name: Spanned<String>,
    pub bdf: Spanned<String>,
    pub peers: Spanned<String>,
    pub peer_node: Option<Spanned<i64>>,
    pub trust_domain: Spanned<String>,
    pub heartbeat_ms: Option<Spanned<i64>>,
    pub lost_after_ms: Option<Spanned<i64>>,
    pub window_limit_bytes: Option<Spanned<Size>>,
    #[serde(default)]
    pub trust_vmm: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Limits {
    pub functions_per_port: Option<Spanned<i64>>,
    pub guest_mapped_bytes: Option<Spanned<Size>>,
    pub functions_per_domain: Option<Spanned<i64>>,
    pub guest_maps: Option<Spanned<i64>>,
    pub worker_messages_per_second: Option<Spanned<i64>>,
    pub interrupts_per_second: Option<Spanned<i64>>,
    pub lease_ttl_ms: Option<Spanned<i64>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Policy {
    #[serde(default)]
    pub allow: Vec<Spanned<String>>,
    pub memory_check: Option<Spanned<String>>,
    pub bars: Option<Spanned<String>>,
    #[serde(default)]
    pub vmm_uids: Vec<Spanned<i64>>,
    #[serde(default)]
    pub vmm_gids: Vec<Spanned<i64>>,
}

/// A number of bytes: an integer, or a string with a suffix.
#[derive(Debug)]
pub(super) enum Size {
    Number(i64),
    Text(String),
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes, such as 1073741824 or \"1G\"")
            }

            fn visit_i64<E>(self, number: i64) -> Result<Size, E> {
                Ok(Size::Number(number))
            }

            fn visit_str<E>(self, text: &str) -> Result<Size, E> {
                Ok(Size::Text(text.to_owned()))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}
