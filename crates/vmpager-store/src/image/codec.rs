//! How the bytes of a frame are compressed.

use std::fmt;
use std::io;

/// A compression method, named in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// Frames are stored as they are.
    None,
    /// LZ4 blocks: the fastest to decode.
    Lz4,
    /// Zstandard: smaller, at a third of the speed.
    Zstd,
}

impl Codec {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::None, Self::Lz4, Self::Zstd];

    /// Its name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    pub(crate) fn number(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    pub(crate) fn of_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| codec.number() == number)
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Compresses frames, one after the other.
pub(crate) enum Encoder {
    None,
    Lz4,
    Zstd(Box<zstd::bulk::Compressor<'static>>),
}

impl Encoder {
    /// A new one; only zstd has levels.
    pub(crate) fn new(codec: Codec, level: i32) -> io::Result<Self> {
        Ok(match codec {
            Codec::None => Self::None,
            Codec::Lz4 => Self::Lz4,
            Codec::Zstd => Self::Zstd(Box::new(zstd::bulk::Compressor::new(level)?)),
        })
    }

    /// Compresses a frame into `to`, replacing what is there. What does not get
    /// smaller is kept as it is: a frame's length tells which.
    pub(crate) fn encode(&mut self, raw: &[u8], to: &mut Vec<u8>) {
        to.resize(raw.len(), 0);
        let packed = match self {
            Self::None => None,
            Self::Lz4 => {
                // The encoder insists on room for the worst case.
                to.resize(lz4_flex::block::get_maximum_output_size(raw.len()), 0);
                lz4_flex::block::compress_into(raw, to).ok()
            }
            // Without room for it, it is not smaller.
            Self::Zstd(compressor) => compressor.compress_to_buffer(raw, &mut to[..]).ok(),
        };
        match packed.filter(|packed| *packed < raw.len()) {
            Some(packed) => to.truncate(packed),
            None => {
                to.clear();
                to.extend_from_slice(raw);
            }
        }
    }
}

/// Decodes frames, one after the other.
pub(crate) struct Decoder {
    /// Made when the first zstd frame comes: most readers see one codec only.
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Decoder")
    }
}

impl Decoder {
    pub(crate) fn new() -> Self {
        Self { zstd: None }
    }

    /// Decodes a frame that has exactly as many bytes as `raw`. Writes nothing
    /// beyond it, whatever the frame claims to be.
    pub(crate) fn decode(
        &mut self,
        codec: Codec,
        frame: &[u8],
        raw: &mut [u8],
    ) -> Result<(), String> {
        if frame.len() == raw.len() {
            raw.copy_from_slice(frame);
            return Ok(());
        }
        let count = match codec {
            Codec::None => Err("it is not as long as its pages".to_owned()),
            Codec::Lz4 => {
                lz4_flex::block::decompress_into(frame, raw).map_err(|error| error.to_string())
            }
            Codec::Zstd => self.zstd(frame, raw).map_err(|error| error.to_string()),
        }?;
        if count != raw.len() {
            return Err(format!("it decodes to {count} bytes, not to {}", raw.len()));
        }
        Ok(())
    }

    fn zstd(&mut self, frame: &[u8], raw: &mut [u8]) -> io::Result<usize> {
        let zstd = match &mut self.zstd {
            Some(zstd) => zstd,
            empty => empty.insert(zstd::bulk::Decompressor::new()?),
        };
        zstd.decompress_to_buffer(frame, raw)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(codec: Codec, raw: &[u8]) -> Vec<u8> {
        let mut frame = vec![7; 3];
        Encoder::new(codec, 1).unwrap().encode(raw, &mut frame);
        frame
    }

    #[test]
    fn what_does_not_shrink_is_kept_as_it_is() {
        let noise: Vec<u8> = (0..16384_u32)
            .flat_map(|n| blake3::hash(&n.to_le_bytes()).as_bytes()[..1].to_vec())
            .collect();
        for codec in Codec::ALL {
            assert_eq!(frame(codec, &noise), noise, "{codec}");
            let text = frame(codec, &[b'x'; 16384]);
            assert_eq!(text.len() < 200, codec != Codec::None, "{codec}: {}", text.len());
        }
    }

    #[test]
    fn a_bomb_ends_at_its_frame() {
        for codec in [Codec::Lz4, Codec::Zstd] {
            let bomb = frame(codec, &vec![0; 2 << 20]);
            let mut raw = vec![1; 65536];
            let error = Decoder::new().decode(codec, &bomb, &mut raw).unwrap_err();
            assert!(!error.is_empty());
            // And one that stays behind what it shall have.
            let short = frame(codec, &[0; 4096]);
            assert!(Decoder::new().decode(codec, &short, &mut raw).is_err(), "{codec}");
        }
    }

    proptest! {
        #[test]
        fn every_frame_comes_back(
            raw in prop::collection::vec(prop_oneof![3 => Just(0_u8), 1 => any::<u8>()], 1..20_000),
            level in -5..10,
        ) {
            let mut decoder = Decoder::new();
            for codec in Codec::ALL {
                let mut packed = Vec::new();
                Encoder::new(codec, level).unwrap().encode(&raw, &mut packed);
                prop_assert!(packed.len() <= raw.len());
                let mut back = vec![0xee; raw.len()];
                prop_assert_eq!(decoder.decode(codec, &packed, &mut back), Ok(()));
                prop_assert_eq!(&back, &raw);
            }
        }

        #[test]
        fn bytes_of_any_kind_decode_or_fail(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
            let mut raw = vec![0; 4096];
            for codec in Codec::ALL {
                let _ = Decoder::new().decode(codec, &bytes, &mut raw);
            }
        }
    }
}
