//! `to_sides`: a matrix in units once more, in the order in which `decode_step` reads it from the near side of L2.

use cudarc::driver::{DeviceRepr, ValidAsZeroBits};

use super::super::buffer::DevBuf;
use super::super::context::Stream;
use super::super::ffi;
use super::matrix::Int4Matrix;
use super::table::Table;
use super::{call, check, launch_on, u32_of};
use crate::error::{Error, Result};
use crate::layout::UNIT_ROWS;
use crate::repack::sides_bytes;

/// A matrix in the order of [`to_sides`], for this GPU.
pub struct OnSides {
    memory: DevBuf<u8>,
    tiles: usize,
    tile_bytes: usize,
    sides: u32,
}

impl OnSides {
    /// A copy of `w`; `None` where L2 has no sides.
    pub fn matrix(stream: &Stream, w: &Int4Matrix) -> Result<Option<OnSides>> {
        OnSides::copy(stream, &w.units, w.n / UNIT_ROWS)
    }

    /// A copy of `table`; `None` where L2 has no sides.
    pub fn table(stream: &Stream, table: &Table) -> Result<Option<OnSides>> {
        OnSides::copy(stream, &table.units, table.vocab / UNIT_ROWS)
    }

    fn copy<T: DeviceRepr + ValidAsZeroBits + Copy>(
        stream: &Stream,
        units: &DevBuf<T>,
        tiles: usize,
    ) -> Result<Option<OnSides>> {
        let Some(sides) = stream.sides().map(|s| s.mask()) else { return Ok(None) };
        let tile_bytes = units.bytes() as usize / tiles.max(1);
        let mut memory =
            DevBuf::on_sides(stream, "weights by the sides of L2", sides_bytes(tiles, tile_bytes))?;
        to_sides(stream, units, tiles, tile_bytes, sides, &mut memory)?;
        Ok(Some(OnSides { memory, tiles, tile_bytes, sides }))
    }

    /// Bytes of device memory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.memory.bytes()
    }

    /// The address, after its shape was found to be that of `tiles` row tiles of `tile_bytes`, in the order of `sides`.
    pub(super) fn ptr(
        &self,
        op: &str,
        stream: &Stream,
        tiles: usize,
        tile_bytes: usize,
        sides: u32,
    ) -> Result<*const u8> {
        if (self.tiles, self.tile_bytes, self.sides) != (tiles, tile_bytes, sides) {
            let what = format!(
                "by sides {:#x} a matrix of {} times {} bytes, wanted by {sides:#x} {tiles} times {tile_bytes}",
                self.sides, self.tiles, self.tile_bytes
            );
            return Err(Error::Cuda { op: op.into(), what });
        }
        self.memory.require(op, sides_bytes(tiles, tile_bytes))?;
        Ok(self.memory.ptr(stream))
    }

    /// The bits by which its pieces lie.
    pub(super) fn sides(&self) -> u32 {
        self.sides
    }
}

/// `to_sides`: `units`, `tiles` row tiles of `tile_bytes` each, to `to`, in the order of [`crate::repack::to_sides`].
#[allow(unsafe_code)]
pub fn to_sides<T: DeviceRepr + ValidAsZeroBits + Copy>(
    stream: &Stream,
    units: &DevBuf<T>,
    tiles: usize,
    tile_bytes: usize,
    sides: u32,
    to: &mut DevBuf<u8>,
) -> Result<()> {
    let op = "to_sides";
    units.require(op, (tiles * tile_bytes).div_ceil(size_of::<T>()))?;
    to.require(op, sides_bytes(tiles, tile_bytes))?;
    let params = ffi::ToSidesParams {
        units: units.ptr(stream).cast(),
        to: to.ptr_mut(stream),
        tiles: u32_of(op, tiles)?,
        tile_bytes: u32_of(op, tile_bytes)?,
        sides,
    };
    call!(to_sides, stream, params)
}
