//! Opens an image and what it builds on.
//!
//! An image that names a backing file chooses a file of the host, so the user has to allow that (`backing=on`). Formats are never
//! guessed: the image has to name the format of its backing file. Nothing is created or changed here.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::FormatAccess;
use imago::qcow2::Qcow2;
use imago::raw::Raw;

use super::header::{self, Header};
use super::ordered::OrderedStorage;
use super::storage::HostStorage;
use crate::disk::observer::Observer;
use crate::disk::{
    BackingImage, Format, OpenError, OpenOptions, OpenReason, image_file, other_formats,
};

const MAX_CHAIN: usize = 64;

/// One layer of a chain, with all below it.
pub(super) type Layer = FormatAccess<OrderedStorage>;

/// A layer, and what its user has to know about it.
pub(super) struct Opened {
    pub(super) layer: Layer,
    pub(super) storage: OrderedStorage,
    pub(super) header: Header,
    /// Bytes of the layer below; 0 without one.
    pub(super) backing: u64,
    /// The images that it builds on, the nearest first.
    pub(super) below: Vec<BackingImage>,
    /// `None`: a temporary file without a name.
    pub(super) itself: Option<BackingImage>,
}

impl Opened {
    /// The images below one that builds on this one.
    pub(super) fn with_below(&self) -> Vec<BackingImage> {
        self.itself.iter().chain(&self.below).cloned().collect()
    }
}

/// Opens the image that `options` name and, if it is one that builds on others, those too.
pub(super) fn open(
    options: &OpenOptions,
    writable: bool,
    observer: Option<Arc<dyn Observer>>,
) -> Result<Opened, OpenError> {
    let format = options.format.unwrap_or_default();
    open_at_depth(&options.path, format, writable, options, observer, 0)
}

fn open_at_depth(
    path: &Path,
    format: Format,
    writable: bool,
    options: &OpenOptions,
    observer: Option<Arc<dyn Observer>>,
    depth: usize,
) -> Result<Opened, OpenError> {
    let refused = |reason: OpenReason| reason.of(path);
    let unusable = |error| refused(OpenReason::Qcow2(error));
    if depth > MAX_CHAIN {
        return Err(refused(OpenReason::BackingChain(MAX_CHAIN)));
    }
    let mut file = image_file::open(path, writable, options).map_err(refused)?;
    file.observer = observer.clone();
    let file = Arc::new(file);
    let header = match format {
        Format::Raw => {
            // Only an image that the user has named can be without a format.
            if depth == 0 && options.format.is_none() {
                other_formats::refuse(&file).map_err(refused)?;
            }
            Header::OF_RAW
        }
        Format::Qcow2 => header::check(&file, writable).map_err(refused)?,
    };
    HostStorage::check_calls(&file, writable).map_err(refused)?;
    let blocks = rustix::fs::fstat(&file).map_or(0, |status| status.st_blocks as u64);
    let itself = |layer: &Layer| {
        let (path, capacity) = (path.to_owned(), layer.size());
        Some(BackingImage { path, format, capacity, allocated: blocks * 512 })
    };
    let file = HostStorage::new(path, &file, writable).map_err(|error| refused(error.into()))?;
    if format == Format::Raw {
        let storage = OrderedStorage::plain(file);
        let layer = Raw::open_image(storage.clone(), writable);
        let layer = FormatAccess::new(layer.map_err(|error| refused(error.into()))?);
        let itself = itself(&layer);
        return Ok(Opened { layer, storage, header, backing: 0, below: Vec::new(), itself });
    }
    let barriers = !options.cache.ignores_flush();
    let storage = OrderedStorage::qcow2(file, header.version, writable, barriers);
    let storage = storage.map_err(unusable)?;
    let mut image = Qcow2::open_image(storage.clone(), writable).map_err(unusable)?;
    let below = match image.implicit_backing_file().cloned() {
        Some(name) => {
            let format = header.backing_format.as_ref().and_then(|word| word.parse().ok());
            let (path, format) = backing(path, name, format, options).map_err(refused)?;
            Some(open_at_depth(&path, format, false, options, observer, depth + 1)?)
        }
        None => None,
    };
    let backing = below.as_ref().map_or(0, |below| below.layer.size());
    let images = below.as_ref().map(Opened::with_below).unwrap_or_default();
    image.set_data_file(None);
    image.set_backing(below.map(|below| below.layer));
    let layer = FormatAccess::new(image);
    let itself = itself(&layer);
    Ok(Opened { layer, storage, header, backing, below: images, itself })
}

/// Where the backing file `name` of the image at `path` is.
fn backing(
    path: &Path,
    name: String,
    format: Option<Format>,
    options: &OpenOptions,
) -> Result<(PathBuf, Format), OpenReason> {
    if !options.backing {
        return Err(OpenReason::Backing(name));
    }
    // As in QEMU, a word and a colon before any slash is a protocol.
    let file = match name.split_once(':') {
        Some(("file", file)) => file,
        Some((protocol, _)) if !protocol.contains('/') => {
            return Err(OpenReason::BackingProtocol(name));
        }
        _ => &name,
    };
    let path = path.parent().unwrap_or(Path::new("")).join(file);
    let format = format.ok_or(OpenReason::BackingFormat(name))?;
    Ok((path, format))
}
