//! How to open an image: the host's half of `--disk`, in QEMU's words.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Everything that decides how an image is opened and how its data travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// The image: a regular file or a block device.
    pub path: PathBuf,
    /// `format=`. Never probed: a guest can write whatever header it likes into a raw image.
    pub format: Format,
    /// `readonly=on`: neither the guest nor we write.
    pub read_only: bool,
    /// `snapshot=on`: the image is only read; writes go to a temporary overlay that vanishes with the disk.
    pub snapshot: bool,
    /// `cache=`.
    pub cache: CacheMode,
    /// `aio=`.
    pub aio: Aio,
    /// `discard=`.
    pub discard: DiscardMode,
    /// `detect-zeroes=`.
    pub detect_zeroes: DetectZeroes,
    /// `locking=`: keep other programs from writing the image behind our back.
    pub locking: bool,
    /// `backing=on`: a qcow2 image may name further files, which are then opened too.
    pub backing: bool,
    /// `scsi=on`: the guest may send SCSI commands to the image, which is a SCSI disk of the host.
    pub scsi: bool,
}

impl OpenOptions {
    /// A raw, writable, locked image with the defaults that each option's type names.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: Format::default(),
            read_only: false,
            snapshot: false,
            cache: CacheMode::default(),
            aio: Aio::default(),
            discard: DiscardMode::default(),
            detect_zeroes: DetectZeroes::default(),
            locking: true,
            backing: false,
            scsi: false,
        }
    }
}

/// A word that an option does not know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is not one of {known}")]
pub struct UnknownWord {
    given: String,
    known: &'static str,
}

/// Defines an option's enum together with its words, so that the two cannot drift apart.
macro_rules! option_words {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)+
        }

        impl $name {
            /// Every value, the default first.
            pub const ALL: &[Self] = &[$(Self::$variant),+];
        }

        impl FromStr for $name {
            type Err = UnknownWord;

            fn from_str(word: &str) -> Result<Self, UnknownWord> {
                match word {
                    $($word => Ok(Self::$variant),)+
                    _ => Err(UnknownWord { given: word.to_owned(), known: concat!($("`", $word, "` "),+).trim_ascii_end() }),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$variant => $word,)+ })
            }
        }
    };
}

option_words! {
    /// What the image's bytes mean.
    Format {
        /// They are the disk.
        #[default]
        Raw = "raw",
        /// A QEMU copy-on-write image, version 2 or 3.
        Qcow2 = "qcow2",
    }
}

option_words! {
    /// Who may hold written data, and for how long: QEMU's cache modes.
    CacheMode {
        /// The host's page cache; durable after a flush.
        #[default]
        Writeback = "writeback",
        /// The page cache is bypassed (O_DIRECT); durable after a flush.
        None = "none",
        /// The page cache serves reads; every write is durable before it completes.
        Writethrough = "writethrough",
        /// The page cache is bypassed and every write is durable before it completes.
        DirectSync = "directsync",
        /// As writeback, but a flush does nothing: fast, and lost with the host's power. For throw-away disks.
        Unsafe = "unsafe",
    }
}

impl CacheMode {
    /// The page cache is bypassed: the file is opened with O_DIRECT.
    pub fn direct(self) -> bool {
        matches!(self, Self::None | Self::DirectSync)
    }

    /// Writes may complete before they are durable, so the guest sees a write cache that it must flush.
    pub fn writeback(self) -> bool {
        !matches!(self, Self::Writethrough | Self::DirectSync)
    }

    /// Durability is not wanted at all.
    pub fn ignores_flush(self) -> bool {
        self == Self::Unsafe
    }
}

option_words! {
    /// Who waits for the host's disk.
    Aio {
        /// The kernel, through an io_uring per worker; worker threads where the host has none.
        #[default]
        IoUring = "io_uring",
        /// A bounded pool of threads per worker.
        Threads = "threads",
    }
}

option_words! {
    /// What becomes of the guest's discards. Unlike QEMU's, the default gives the space back: images are sparse files
    /// more often than preallocated ones.
    DiscardMode {
        /// The blocks go back to the host.
        #[default]
        Unmap = "unmap",
        /// The guest is not offered discards, and blocks stay allocated.
        Ignore = "ignore",
    }
}

option_words! {
    /// Whether writes are searched for zeroes.
    DetectZeroes {
        /// They are not.
        #[default]
        Off = "off",
        /// A write of nothing but zeroes becomes a write-zeroes that keeps its blocks allocated.
        On = "on",
        /// It becomes one that gives the blocks back, if `discard=unmap` lets it.
        Unmap = "unmap",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words<T: FromStr<Err = UnknownWord> + fmt::Display + PartialEq + fmt::Debug + Default + Copy>(
        all: &[T],
        known: &[&str],
    ) {
        assert_eq!(all[0], T::default());
        assert_eq!(all.iter().map(T::to_string).collect::<Vec<_>>(), known);
        for value in all {
            assert_eq!(value.to_string().parse::<T>().as_ref(), Ok(value));
        }
        for bad in ["", "RAW", "on ", "none\n", "nonsense"] {
            let error = bad.parse::<T>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("`{bad}` is not one of `{}`", known[0])), "{error}");
            assert!(error.ends_with(&format!("`{}`", known[known.len() - 1])), "{error}");
        }
    }

    #[test]
    fn every_word_round_trips() {
        words(Format::ALL, &["raw", "qcow2"]);
        words(CacheMode::ALL, &["writeback", "none", "writethrough", "directsync", "unsafe"]);
        words(Aio::ALL, &["io_uring", "threads"]);
        words(DiscardMode::ALL, &["unmap", "ignore"]);
        words(DetectZeroes::ALL, &["off", "on", "unmap"]);
    }

    #[test]
    fn cache_modes_are_qemus() {
        // QEMU's table (cache.writeback, cache.direct, cache.no-flush).
        let table = CacheMode::ALL.iter().map(|mode| (mode.writeback(), mode.direct(), mode.ignores_flush()));
        let expected = [
            (true, false, false),
            (true, true, false),
            (false, false, false),
            (false, true, false),
            (true, false, true),
        ];
        assert!(table.eq(expected));
    }
}
