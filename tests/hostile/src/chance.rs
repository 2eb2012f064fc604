//! Random values that are worth trying.

/// Bytes of RAM behind the arena's start that devices may write to: the guest's own code and stack
/// lie elsewhere, so that it lives on to try more.
pub const ARENA: u64 = 8 << 20;

/// A reproducible source of chance (xorshift64*).
#[derive(Debug)]
pub struct Chance {
    state: u64,
    arena: u64,
}

impl Chance {
    /// Begins with `seed`. The last [`ARENA`] bytes of RAM, which ends at `ram_end`, are the arena.
    pub fn new(seed: u64, ram_end: u64) -> Self {
        Self {
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            arena: ram_end.saturating_sub(ARENA),
        }
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.bits() % end.max(1)
    }

    /// Once in `n` times.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of the values.
    pub fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len() as u64) as usize]
    }

    /// Start of the arena.
    pub fn arena(&self) -> u64 {
        self.arena
    }

    /// An address in the arena with room for `room` bytes.
    pub fn inside(&mut self, room: u64) -> u64 {
        self.arena + self.below(ARENA - room.min(ARENA - 1))
    }

    /// A guest address that a device may be told without harm to this guest's own code: in the
    /// arena, over its end, in the hole for devices, behind all memory, or close to wrapping.
    pub fn address(&mut self) -> u64 {
        let end = self.arena + ARENA;
        match self.below(8) {
            0..4 => self.inside(1),
            4 => end - self.below(64),
            5 => end + self.below(1 << 24),
            6 => 0xc000_0000 + self.below(0x4000_0000),
            _ => {
                let bits = self.below(63);
                u64::MAX - self.below(1 << bits)
            }
        }
    }

    /// A length: mostly small, sometimes at the edges of its type.
    pub fn length(&mut self) -> u32 {
        match self.below(8) {
            0 => 0,
            1..5 => self.below(64) as u32,
            5 => self.below(9000) as u32,
            6 => self.one_of(&[
                u32::MAX,
                u32::MAX - 1,
                0x8000_0000,
                0x7fff_ffff,
                1 << 20,
                65536,
            ]),
            _ => self.bits() as u32,
        }
    }

    /// A number of any width, preferring those where programs err.
    pub fn number(&mut self) -> u64 {
        match self.below(6) {
            0 => 0,
            1 => self.below(8),
            2 => 1 << self.below(64),
            3 => (1u64 << self.below(64)).wrapping_sub(1),
            4 => u64::MAX - self.below(8),
            _ => self.bits(),
        }
    }

    /// Fills `bytes`.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            *byte = self.bits() as u8;
        }
    }
}
