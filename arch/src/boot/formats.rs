//! The formats of kernels: what a file has to be to become a [`Kernel`]. Formats are plugged in here and nowhere else.

use super::{Error, Kernel, ReadAt, bzimage, elf, signatures};

/// How much of a file's start is read to find out what it is. The longest header (the bzImage's) and all signatures
/// of other formats lie within.
const START_SIZE: usize = 0x1000;

impl Kernel {
    /// Reads and checks the headers of `file`.
    ///
    /// # Errors
    /// The file is not a kernel that can boot here. The error says what the file is and what to give instead.
    pub fn parse(file: &dyn ReadAt) -> Result<Self, Error> {
        let start = file.read_at(0, START_SIZE).map_err(Error::Read)?;
        if start.is_empty() {
            return Err(Error::Empty);
        }
        let size = file.size().map_err(Error::Read)?;
        let kernel = match elf::parse(file, &start, size)? {
            Some(kernel) => Some(kernel),
            None => bzimage::parse(&start, size)?,
        };
        kernel.ok_or_else(|| Error::NotAKernel { looks_like: signatures::describe(&start) })
    }
}
