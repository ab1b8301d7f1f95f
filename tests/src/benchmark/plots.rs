//! Plots, as SVG: how cost grows.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// Measured points of one curve, by what grows.
#[derive(Clone, Debug)]
pub struct Curve {
    /// Whose cost it is.
    pub name: &'static str,
    /// (x, CPU seconds per GiB of log, peak memory in MiB).
    pub points: Vec<(f64, f64, f64)>,
}

const SIZE: (u32, u32) = (900, 380);
const COLOURS: [RGBColor; 3] = [RGBColor(31, 94, 168), RGBColor(199, 91, 18), RGBColor(60, 130, 70)];

/// Draws CPU and memory of the curves side by side over a logarithmic axis, and writes them to `path`.
///
/// # Errors
/// It can't be written, or there is nothing to draw.
pub fn draw(path: &Path, what_grows: &str, curves: &[Curve]) -> Result<()> {
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    let failed = |error: &dyn std::fmt::Display| anyhow!("drawing {}: {error}", path.display());
    area.fill(&WHITE).map_err(|error| failed(&error))?;
    let (left, right) = area.split_horizontally(SIZE.0 / 2);
    panel(&left, "CPU seconds per GiB of log", what_grows, curves, |point| point.1).map_err(|error| failed(&error))?;
    panel(&right, "peak memory, MiB", what_grows, curves, |point| point.2).map_err(|error| failed(&error))?;
    area.present().map_err(|error| failed(&error))
}

fn panel(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    title: &str,
    what_grows: &str,
    curves: &[Curve],
    value: impl Fn(&(f64, f64, f64)) -> f64,
) -> Result<()> {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let smallest = points().map(|point| point.0).fold(f64::INFINITY, f64::min);
    let largest = points().map(|point| point.0).fold(0.0, f64::max);
    let highest = points().map(&value).fold(0.0, f64::max);
    anyhow::ensure!(smallest > 0.0 && largest > smallest && highest > 0.0, "there are no points");
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 16))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(48)
        .build_cartesian_2d((smallest..largest * 1.05).log_scale(), 0.0..highest * 1.15)
        .map_err(|error| anyhow!("{error}"))?;
    let mesh = chart.configure_mesh().x_desc(what_grows).light_line_style(WHITE.mix(0.0)).draw();
    mesh.map_err(|error| anyhow!("{error}"))?;
    for (curve, colour) in curves.iter().zip(COLOURS.iter().cycle()) {
        let line: Vec<(f64, f64)> = curve.points.iter().map(|point| (point.0, value(point))).collect();
        let dots = line.iter().map(|point| Circle::new(*point, 3, colour.filled())).collect::<Vec<_>>();
        let drawn =
            chart.draw_series(LineSeries::new(line, colour.stroke_width(2))).map_err(|error| anyhow!("{error}"))?;
        drawn.label(curve.name).legend(|(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
        chart.draw_series(dots).map_err(|error| anyhow!("{error}"))?;
    }
    let labels = chart.configure_series_labels().border_style(BLACK.mix(0.3)).background_style(WHITE).draw();
    labels.map_err(|error| anyhow!("{error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_shows_every_curve_by_name() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("plot.svg");
        let curve = |name| Curve { name, points: vec![(1.0, 3.0, 20.0), (100.0, 3.5, 40.0)] };
        draw(&path, "agents", &[curve("edge"), curve("root")])?;
        let text = std::fs::read_to_string(&path)?;
        for wanted in ["<svg", "edge", "root", "agents", "peak memory"] {
            assert!(text.contains(wanted), "no {wanted:?} in {text:.300}");
        }
        assert!(draw(&path, "agents", &[]).is_err());
        Ok(())
    }
}
