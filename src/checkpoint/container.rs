//! The safetensors container: 8 bytes of header length, a JSON header, then the tensors' bytes without a gap.
//!
//! The `safetensors` crate parses the header and has the last word on it. Before it is asked, the header is checked
//! here, for three reasons: the crate's errors mostly do not name the tensor, it takes the last of two tensors with
//! one name where the format forbids duplicates, and it accepts headers of 100 MB, which take gigabytes to parse.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorInfo;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::float::{FloatTensor, FloatType};
use super::source::Bytes;
use crate::config::parse_object;
use crate::error::{Error, Result};

/// Longest header accepted. Falcon-7B's has 0.1 MB, 40B's would have 0.2 MB.
const MAX_HEADER_BYTES: usize = 1 << 20;
/// Most dimensions a tensor may have; Falcon's have at most 2.
const MAX_DIMENSIONS: usize = 8;
/// The header's length field.
const LENGTH_BYTES: usize = 8;

/// A weights file, mapped.
pub(crate) struct WeightFile {
    pub(crate) path: PathBuf,
    pub(crate) bytes: Bytes,
}

/// Where a tensor lies. The range is inside the file, and as long as shape and dtype say.
#[derive(Debug, Clone)]
pub(crate) struct TensorPlace {
    /// Index into [`Container::files`].
    pub(crate) file: usize,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Bytes from the start of the file.
    pub(crate) range: Range<usize>,
}

/// A matrix or vector of the model, with dtype and shape checked.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    file: usize,
    range: Range<usize>,
    shape: [usize; 2],
    /// `None` is I32.
    float: Option<FloatType>,
}

/// All weights files of a checkpoint and every tensor in them.
pub(crate) struct Container {
    pub(crate) files: Vec<WeightFile>,
    pub(crate) tensors: BTreeMap<String, TensorPlace>,
}

impl Container {
    /// Reads the headers of `files`.
    ///
    /// # Errors
    /// [`Error::Model`] for a damaged header and for a name that two files hold.
    pub(crate) fn new(files: Vec<WeightFile>) -> Result<Container> {
        let mut tensors: BTreeMap<String, TensorPlace> = BTreeMap::new();
        for (index, file) in files.iter().enumerate() {
            for (name, place) in read_header(&file.path, &file.bytes, index)? {
                match tensors.entry(name) {
                    Entry::Vacant(slot) => drop(slot.insert(place)),
                    Entry::Occupied(old) => {
                        let other = files[old.get().file].path.display();
                        let what =
                            format!("tensor {} is in {other} as well; a tensor has one place", old.key());
                        return Err(Error::model(&file.path, what));
                    }
                }
            }
        }
        Ok(Container { files, tensors })
    }

    /// The file the message about a missing tensor is about: the only one, or the folder of the shards.
    pub(crate) fn missing_in(&self) -> &Path {
        match &self.files[..] {
            [only] => &only.path,
            [first, ..] => first.path.parent().unwrap_or(&first.path),
            [] => Path::new(""),
        }
    }

    /// An error about tensor `name`, naming its file.
    pub(crate) fn error(&self, name: &str, what: impl std::fmt::Display) -> Error {
        let file = self.tensors.get(name).map_or(self.missing_in(), |t| &self.files[t.file].path);
        Error::model(file, format_args!("tensor {name}: {what}"))
    }

    /// The I32 tensor `name` of `shape`; a vector of n is `[1, n]`.
    pub(crate) fn int(&self, name: &str, shape: [usize; 2]) -> Result<Place> {
        let place = self.shaped(name, shape)?;
        match self.tensors[name].dtype {
            Dtype::I32 => Ok(place),
            other => Err(self.error(name, format_args!("dtype is {other}, wanted I32"))),
        }
    }

    /// The float tensor `name` of `shape`; a vector of n is `[1, n]`.
    pub(crate) fn float(&self, name: &str, shape: [usize; 2]) -> Result<Place> {
        let mut place = self.shaped(name, shape)?;
        place.float = Some(match self.tensors[name].dtype {
            Dtype::F32 => FloatType::F32,
            Dtype::F16 => FloatType::F16,
            Dtype::BF16 => FloatType::BF16,
            other => return Err(self.error(name, format_args!("dtype is {other}, wanted F16, BF16 or F32"))),
        });
        Ok(place)
    }

    fn shaped(&self, name: &str, shape: [usize; 2]) -> Result<Place> {
        let Some(tensor) = self.tensors.get(name) else {
            let plain = name.strip_suffix(".qweight").map(|module| format!("{module}.weight"));
            if plain.is_some_and(|plain| self.tensors.contains_key(&plain)) {
                return Err(self
                    .error(name, "is missing, and an unquantised .weight is there: not a GPTQ checkpoint"));
            }
            let found = self.tensors.len();
            return Err(
                self.error(name, format_args!("is missing; the checkpoint has {found} other tensors"))
            );
        };
        let fits = match (&tensor.shape[..], shape) {
            ([n], [1, wanted]) => *n == wanted,
            ([rows, cols], wanted) => [*rows, *cols] == wanted,
            _ => false,
        };
        if !fits {
            return Err(
                self.error(name, format_args!("shape is {:?}, wanted {}", tensor.shape, show_shape(shape)))
            );
        }
        Ok(Place { file: tensor.file, range: tensor.range.clone(), shape, float: None })
    }

    /// The bytes of a tensor.
    pub(crate) fn bytes(&self, place: &Place) -> &[u8] {
        &self.files[place.file].bytes[place.range.clone()]
    }

    /// The view of a tensor that [`Container::float`] found.
    pub(crate) fn float_view(&self, place: &Place) -> FloatTensor<'_> {
        // Only `float` makes places that are read as floats, and it always sets the type.
        let dtype = place.float.unwrap_or(FloatType::F32);
        FloatTensor { dtype, shape: place.shape, bytes: self.bytes(place) }
    }
}

impl TensorPlace {
    /// Number of values.
    pub(crate) fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

fn show_shape(shape: [usize; 2]) -> String {
    match shape {
        [1, n] => format!("[{n}] or [1, {n}]"),
        [rows, cols] => format!("[{rows}, {cols}]"),
    }
}

/// Every tensor of one file, with its place in the file.
fn read_header(path: &Path, bytes: &[u8], file: usize) -> Result<Vec<(String, TensorPlace)>> {
    let wrong = |what: String| Error::model(path, what);
    let size = bytes.len();
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(wrong(format!("has {size} bytes, too few for a safetensors header: truncated")));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES as u64 {
        return Err(wrong(format!(
            "says its header has {length} bytes, wanted at most {MAX_HEADER_BYTES}: no safetensors file, or damaged"
        )));
    }
    let length = length as usize;
    let Some(header) = rest.get(..length) else {
        return Err(wrong(format!("says its header has {length} bytes, but the file has {size}: truncated")));
    };
    if header.first() != Some(&b'{') {
        return Err(wrong("header does not begin with {: no safetensors file".to_owned()));
    }
    let data_start = LENGTH_BYTES + length;
    let header_map = parse_object(path, header)
        .map_err(|_| wrong("header is not a JSON object: no safetensors file, or damaged".to_owned()))?;
    if let Some(name) = first_duplicate(header) {
        return Err(wrong(format!("tensor {name} is in the header twice")));
    }
    check_places(path, &header_map, size - data_start)?;
    drop(header_map);
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| wrong(format!("header: {e}")))?;
    let place = |info: &TensorInfo| TensorPlace {
        file,
        dtype: info.dtype,
        shape: info.shape.clone(),
        range: data_start + info.data_offsets.0..data_start + info.data_offsets.1,
    };
    Ok(metadata.tensors().into_iter().map(|(name, info)| (name, place(info))).collect())
}

/// Whether every tensor is as long as its shape says, and all of them tile the file's `data_bytes`.
fn check_places(path: &Path, header: &serde_json::Map<String, Value>, data_bytes: usize) -> Result<()> {
    let mut places = Vec::with_capacity(header.len());
    for (name, value) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let wrong = |what: String| Error::model(path, format_args!("tensor {name}: {what}"));
        if value.get("shape").and_then(Value::as_array).is_some_and(|s| s.len() > MAX_DIMENSIONS) {
            return Err(wrong(format!("shape has more than {MAX_DIMENSIONS} dimensions")));
        }
        let info: TensorInfo =
            serde_json::from_value(value.clone()).map_err(|e| wrong(format!("header: {e}")))?;
        let (start, end) = info.data_offsets;
        if start > end {
            return Err(wrong(format!("data_offsets are [{start}, {end}], wanted a start before the end")));
        }
        if end > data_bytes {
            return Err(wrong(format!(
                "data_offsets end at {end}, but the file has {data_bytes} bytes of data: truncated"
            )));
        }
        let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |bits, &d| bits.checked_mul(d));
        if bits != (end - start).checked_mul(8) {
            return Err(wrong(format!(
                "data_offsets span {} bytes, which is not {:?} of {}",
                end - start,
                info.shape,
                info.dtype
            )));
        }
        places.push((start, end, name));
    }
    places.sort_unstable();
    let mut covered = 0;
    for (start, end, name) in places {
        if start != covered {
            let what =
                if start < covered { "overlaps the tensor before it" } else { "leaves a hole before it" };
            let what = format!("tensor {name}: data_offsets begin at {start}, wanted {covered}: {what}");
            return Err(Error::model(path, what));
        }
        covered = end;
    }
    if covered != data_bytes {
        let what =
            format!("the tensors end at byte {covered} of {data_bytes}: the rest belongs to none of them");
        return Err(Error::model(path, what));
    }
    Ok(())
}

/// The first key that the outermost object of `json` has twice. `json` must be valid JSON.
fn first_duplicate(json: &[u8]) -> Option<String> {
    let mut seen = std::collections::BTreeSet::new();
    let (mut depth, mut i) = (0usize, 0usize);
    while let Some(&byte) = json.get(i) {
        match byte {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            b'"' => {
                let start = i;
                i += 1;
                while json.get(i).is_some_and(|&b| b != b'"') {
                    i += if json[i] == b'\\' { 2 } else { 1 };
                }
                let is_key = json[i + 1..].iter().find(|b| !b.is_ascii_whitespace()) == Some(&b':');
                if depth == 1 && is_key {
                    // Decoded, because "\u0061" and "a" are one name.
                    let key: String = serde_json::from_slice(&json[start..=i]).unwrap_or_default();
                    if let Some(key) = seen.replace(key) {
                        return Some(key);
                    }
                }
            }
            _ => {}
        }
        i += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicates_are_found_among_the_outer_keys_only() {
        assert_eq!(first_duplicate(br#"{"a":{"x":1},"b":{"x":1},"c":"a"}"#), None);
        assert_eq!(first_duplicate(br#"{"a\"":[{"b":1}],"b" : "}" , "\u0062":3}"#), Some("b".to_owned()));
        assert_eq!(first_duplicate(br#"{}"#), None);
    }
}
