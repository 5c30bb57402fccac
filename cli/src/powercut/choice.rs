//! Which of the open changes a state has, and the name of that.
//!
//! A name is the epoch, a colon, and one part for each open change in the order of the log: `1` it is there, `0` it is not, `s` and its
//! sectors if it is torn. `12x1` stands for twelve parts `1`, and `s3x1.5x0` for a write of which the first three of eight sectors are
//! there. `all` and `none` stand for all parts being `1` or `0`.

use std::fmt;
use std::str::FromStr;

/// Most parts of a name, so that a mistyped count asks for no memory.
const PARTS_MAX: usize = 1 << 24;

/// How much of an open change is there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Presence {
    Absent,
    Whole,
    /// By sector.
    Torn(Vec<bool>),
}

/// A state: the epoch, and the presence of each open change.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Choice {
    pub(super) epoch: usize,
    pub(super) parts: Vec<Presence>,
}

/// A name that is none.
#[derive(Debug, thiserror::Error)]
#[error("write EPOCH:BITS as the report has it, such as 3:12x1,0 or 3:none")]
pub(super) struct NoState;

/// `N` and `COUNTxN` for the runs of equal `words`.
fn runs(words: &[String], separator: &str) -> String {
    let runs = words.chunk_by(|one, other| one == other).map(|run| match run.len() {
        1 => run[0].clone(),
        count => format!("{count}x{}", run[0]),
    });
    runs.collect::<Vec<_>>().join(separator)
}

/// The words that `runs` made `text` of.
fn words(text: &str, separator: char) -> Result<Vec<&str>, NoState> {
    let mut words = Vec::new();
    for run in text.split(separator) {
        let (count, word) = match run.split_once('x') {
            // A torn part has counts of its own.
            Some((count, word)) if !count.starts_with('s') => {
                (count.parse().map_err(|_| NoState)?, word)
            }
            _ => (1, run),
        };
        if words.len() + count > PARTS_MAX {
            return Err(NoState);
        }
        words.extend(std::iter::repeat_n(word, count));
    }
    Ok(words)
}

fn bit(word: &str) -> Result<bool, NoState> {
    match word {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => Err(NoState),
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = |presence| self.parts.iter().all(|part| *part == presence);
        let bits = match () {
            () if all(Presence::Absent) => "none".to_owned(),
            () if all(Presence::Whole) => "all".to_owned(),
            () => {
                let bit = |bit: bool| u8::from(bit).to_string();
                let word = |part: &Presence| match part {
                    Presence::Absent => bit(false),
                    Presence::Whole => bit(true),
                    Presence::Torn(sectors) => {
                        let sectors: Vec<_> = sectors.iter().map(|sector| bit(*sector)).collect();
                        format!("s{}", runs(&sectors, "."))
                    }
                };
                runs(&self.parts.iter().map(word).collect::<Vec<_>>(), ",")
            }
        };
        write!(f, "{}:{bits}", self.epoch)
    }
}

/// A name as the user gives it: `all` and `none` have no parts yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum StateName {
    Every(usize, Presence),
    Parts(Choice),
}

impl StateName {
    /// The state, of an epoch with `open` open changes of so many sectors. `None`: it has others.
    pub(super) fn choice(&self, open: &[u64]) -> Option<Choice> {
        let choice = match self {
            Self::Every(epoch, presence) => {
                Choice { epoch: *epoch, parts: vec![presence.clone(); open.len()] }
            }
            Self::Parts(choice) => choice.clone(),
        };
        let fits = |(part, sectors): (&Presence, &u64)| match part {
            Presence::Torn(torn) => torn.len() as u64 == *sectors,
            _ => true,
        };
        let same = choice.parts.len() == open.len();
        (same && choice.parts.iter().zip(open).all(fits)).then_some(choice)
    }

    pub(super) fn epoch(&self) -> usize {
        match self {
            Self::Every(epoch, _) => *epoch,
            Self::Parts(choice) => choice.epoch,
        }
    }
}

impl FromStr for StateName {
    type Err = NoState;

    fn from_str(text: &str) -> Result<Self, NoState> {
        let (epoch, bits) = text.split_once(':').ok_or(NoState)?;
        let epoch = epoch.parse().map_err(|_| NoState)?;
        let part = |word: &str| match word.strip_prefix('s') {
            None => Ok(if bit(word)? { Presence::Whole } else { Presence::Absent }),
            Some(runs) => {
                let bits = words(runs, '.')?.into_iter().map(bit);
                Ok(Presence::Torn(bits.collect::<Result<_, _>>()?))
            }
        };
        match bits {
            "all" => Ok(Self::Every(epoch, Presence::Whole)),
            "none" => Ok(Self::Every(epoch, Presence::Absent)),
            _ => {
                let parts = words(bits, ',')?.into_iter().map(part).collect::<Result<_, _>>()?;
                Ok(Self::Parts(Choice { epoch, parts }))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        let torn = Presence::Torn(vec![true, true, false, true]);
        let parts = vec![Presence::Whole, Presence::Whole, torn.clone(), Presence::Absent, torn];
        let choice = Choice { epoch: 7, parts };
        assert_eq!(choice.to_string(), "7:2x1,s2x1.0.1,0,s2x1.0.1");
        let read = choice.to_string().parse::<StateName>().unwrap();
        assert_eq!(read.choice(&[8, 8, 4, 8, 4]), Some(choice));
        assert_eq!(read.choice(&[8, 8, 5, 8, 4]), None, "the torn write has other sectors");
        assert_eq!(read.choice(&[8]), None);
        let none = "3:none".parse::<StateName>().unwrap().choice(&[1, 1]).unwrap();
        assert_eq!((none.to_string().as_str(), none.parts.len()), ("3:none", 2));
        for bad in ["", "3", ":1", "3:", "3:2", "x:1", "3:99999999999x1", "3:s", "3:1,,0"] {
            assert!(bad.parse::<StateName>().is_err(), "{bad}");
        }
    }
}
