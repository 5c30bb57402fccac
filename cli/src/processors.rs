//! Lists of the host's processors as taskset and libvirt take them: `0,2-3`.

/// Processor numbers, in the order given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Processors(pub(crate) Vec<usize>);

/// More than Linux can tell apart.
const MAX: usize = 8192;

/// Reads a list.
///
/// # Errors
/// One line that says what would work.
pub(crate) fn list(text: &str) -> Result<Processors, String> {
    let usage = || "write numbers and ranges of processors: 0,2-3".to_owned();
    let number = |text: &str| text.parse::<usize>().ok().filter(|number| *number < MAX).ok_or_else(usage);
    let mut processors = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let range = number(first)?..=number(last)?;
        if range.is_empty() {
            return Err(usage());
        }
        processors.extend(range);
    }
    Ok(Processors(processors))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists() {
        assert_eq!(list("0"), Ok(Processors(vec![0])));
        assert_eq!(list("3,0-2,3"), Ok(Processors(vec![3, 0, 1, 2, 3])));
        for bad in ["", ",", "1,", "-1", "2-1", "0-", "a", "0-8192", "1 2", "18446744073709551616"] {
            assert!(list(bad).is_err(), "{bad}");
        }
    }
}
