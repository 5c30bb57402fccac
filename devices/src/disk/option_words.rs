//! The words of `--disk` for the values of an image's options, parsed and printed.
//!
//! A capability: the core has the values. It hooks in as [`FromStr`] and [`Display`](fmt::Display) of their types, which the command
//! line and QMP use. Each word is the one under which a saved machine stores the value.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use super::{Aio, CacheMode, DetectZeroes, DiscardMode, Format};

/// A word that an option does not know. The message lists the words that it knows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is not one of {known}")]
pub struct UnknownWord {
    given: String,
    known: String,
}

/// Parses and prints the values of each type. A value that is missing here does not compile.
macro_rules! option_words {
    ($($name:ident: $($variant:ident)+;)+) => {$(
        impl $name {
            /// Every value, the default first, in the order of the help.
            pub const ALL: &[Self] = {
                let _all_are_here = |value| match value { $(Self::$variant => {})+ };
                &[$(Self::$variant),+]
            };
        }

        impl FromStr for $name {
            type Err = UnknownWord;

            fn from_str(word: &str) -> Result<Self, UnknownWord> {
                let value = Self::ALL.iter().find(|value| value.to_string() == word);
                value.copied().ok_or_else(|| {
                    let known: Vec<_> = Self::ALL.iter().map(|value| format!("`{value}`")).collect();
                    UnknownWord { given: word.to_owned(), known: known.join(" ") }
                })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.serialize(f)
            }
        }
    )+};
}

option_words! {
    Format: Raw Qcow2;
    CacheMode: Writeback None Writethrough DirectSync Unsafe;
    Aio: IoUring Threads;
    DiscardMode: Unmap Ignore;
    DetectZeroes: Off On Unmap;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words<
        T: FromStr<Err = UnknownWord> + fmt::Display + PartialEq + fmt::Debug + Default + Copy,
    >(
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
}
