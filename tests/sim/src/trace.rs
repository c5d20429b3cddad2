//! What happened: always as a hash, and as lines for a person where a story is asked for.

/// The trace of one schedule.
#[derive(Debug, Default)]
pub struct Trace {
    hash: u64,
    story: Option<Vec<String>>,
    at_ms: u64,
}

/// How many lines a story has at most.
const STORY_LINES_MAX: usize = 20_000;

impl Trace {
    /// With or without a story.
    pub fn new(story: bool) -> Self {
        Self {
            hash: 0xcbf2_9ce4_8422_2325,
            story: story.then(Vec::new),
            at_ms: 0,
        }
    }

    /// The time of what comes next.
    pub fn at(&mut self, now_ms: u64) {
        self.at_ms = now_ms;
    }

    /// Something happened.
    pub fn mix(&mut self, value: u64) {
        let mixed = (self.hash ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.hash = mixed ^ mixed >> 29;
    }

    /// Something happened that a person wants to read. `code` stands for it in the hash.
    pub fn tell(&mut self, code: u64, line: impl FnOnce() -> String) {
        self.mix(code);
        let at_ms = self.at_ms;
        if let Some(story) = &mut self.story
            && story.len() < STORY_LINES_MAX
        {
            story.push(format!(
                "{:>5}.{:03} s  {}",
                at_ms / 1000,
                at_ms % 1000,
                line()
            ));
        }
    }

    /// The hash so far.
    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// The lines, if a story was asked for.
    pub fn story(&self) -> &[String] {
        self.story.as_deref().unwrap_or_default()
    }
}
