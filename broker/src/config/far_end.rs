//! Which node is at the far end of a port: what its peer says, unless the configuration knows better.

use super::Config;

/// What the configuration knows of a port's far end. A peer says by itself which node it is, and
/// another host could say the same: guests that borrow from the one would be served by the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FarEnd {
    own: u16,
    /// This port's own `peer_node`.
    node: Option<u16>,
    /// Where the other ports lead, by theirs.
    elsewhere: Vec<(u16, String)>,
}

/// Why a peer is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotBelieved {
    /// It says that it is this host.
    #[error(
        "its far end says that it is node {0:x}, which is this host: check the cable, and `id` under [node] on both hosts"
    )]
    Own(u16),
    /// Another one is expected.
    #[error(
        "its far end says that it is node {said:x}, and `peer_node` names node {node:x}: check the cable, and `peer_node`"
    )]
    Other {
        /// What it says.
        said: u16,
        /// What the configuration says.
        node: u16,
    },
    /// That one is behind another port.
    #[error(
        "its far end says that it is node {said:x}, to which `peer_node` of port `{port}` leads: check the cables; if there are two to that host, write peer_node = {said} under both [[port]]"
    )]
    Elsewhere {
        /// What it says.
        said: u16,
        /// Which port.
        port: String,
    },
}

impl FarEnd {
    /// The node that a peer says it is, if it may be that.
    pub fn check(&self, said: u16) -> Result<u16, NotBelieved> {
        if said == self.own {
            return Err(NotBelieved::Own(said));
        }
        match self.node {
            Some(node) if node == said => return Ok(said),
            Some(node) => return Err(NotBelieved::Other { said, node }),
            None => {}
        }
        match self.elsewhere.iter().find(|(node, _)| *node == said) {
            Some((_, port)) => Err(NotBelieved::Elsewhere {
                said,
                port: port.clone(),
            }),
            None => Ok(said),
        }
    }

    /// Whether the configuration says it.
    pub fn is_declared(&self) -> bool {
        self.node.is_some()
    }
}

impl Config {
    /// What is known of the far end of the port of this index.
    pub fn far_end(&self, at: usize) -> FarEnd {
        let others = self
            .ports
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != at);
        let elsewhere = others.filter_map(|(_, port)| Some((port.peer_node?, port.name.clone())));
        FarEnd {
            own: self.node_id,
            node: self.ports[at].peer_node,
            elsewhere: elsewhere.collect(),
        }
    }
}
